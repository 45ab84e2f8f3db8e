"""What survives a restart: declarations, in SQLite on one machine."""
