"""One connection: calls, deadlines, tries."""
