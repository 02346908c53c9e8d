"""Optimizers and checkpoints on the server, apart from steps."""
