"""The conversion language: text to tree to fragments. Its place is kept; it is not built yet."""
