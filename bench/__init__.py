"""Every claim as a number: one file a promise. See SPECIFICATION.md for the figures."""
