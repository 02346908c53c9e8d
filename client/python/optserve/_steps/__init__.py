"""A step from its gradients to its updates."""
