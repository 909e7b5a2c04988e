"""Other libraries' files as fragments. Its place is kept; it is not built yet."""
