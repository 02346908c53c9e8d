"""Code that client and server share, beside the contract."""
