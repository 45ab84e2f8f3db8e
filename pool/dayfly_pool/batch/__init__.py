"""Jobs: work that takes what the functions leave of the pool."""
