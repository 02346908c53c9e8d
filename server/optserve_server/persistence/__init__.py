"""What is on disk: journal, snapshots, checkpoints, and how a server comes back from them."""
