"""Programs that use optserve, to run and to read."""
