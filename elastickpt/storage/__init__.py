"""Bytes and arrays: stores with declared capabilities. Nothing here knows a rank."""
