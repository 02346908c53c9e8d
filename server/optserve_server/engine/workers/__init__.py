"""Several workers that share one optimizer."""
