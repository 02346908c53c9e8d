"""State and arithmetic: layouts, methods, backends, and what is checked of numbers."""
