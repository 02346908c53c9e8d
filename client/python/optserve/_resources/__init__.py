"""What a client knows of optimizers and checkpoints."""
