"""Generators of the vectors. They use json, msgpack, xxhash and struct, never the library under test."""
