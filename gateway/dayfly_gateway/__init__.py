"""The gateway: HTTP data plane, management API and command line."""
