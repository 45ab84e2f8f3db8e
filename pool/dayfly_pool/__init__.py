"""The pool: sandboxes, scheduling and scaling. Import its modules by name."""
