"""Workflows: what their steps hand over, and where it lies."""
