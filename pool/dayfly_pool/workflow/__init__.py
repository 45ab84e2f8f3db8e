"""Workflows: steps on the pool, whose order, data and ends are written down."""
