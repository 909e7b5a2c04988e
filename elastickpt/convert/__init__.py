"""The conversion engine. Its place is kept; it is not built yet."""
