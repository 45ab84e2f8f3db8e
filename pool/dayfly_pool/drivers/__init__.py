"""The drivers. Light on purpose: the launcher is imported without third-party packages."""
