"""The commands that run in the server's package."""
