"""Checks and conversions of what users pass: arrays and settings."""
