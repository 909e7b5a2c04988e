"""A run and its history: discovery, retention, epochs. Its place is kept; it is not built yet."""
