"""The optserve server: keeps optimizer state and applies steps to it. Start it with `optserve serve`."""
