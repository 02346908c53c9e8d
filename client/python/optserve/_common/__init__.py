"""What client and server share, beside the contract."""
