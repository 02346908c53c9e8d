"""Optimizers and their steps: who may make one, what it changes, and in which order."""
