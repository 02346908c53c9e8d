"""Errors and configuration, which all other packages may import."""
