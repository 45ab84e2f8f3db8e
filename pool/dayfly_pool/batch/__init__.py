"""Batch jobs: many tasks of one function on the pool, beside what people wait for."""
