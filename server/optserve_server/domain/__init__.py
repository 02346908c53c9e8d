"""What all others may use: errors and configuration."""
