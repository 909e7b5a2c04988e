"""Bytes and arrays by path, no ranks: stores with declared capabilities, aligned memory, and zarr as others read it."""
