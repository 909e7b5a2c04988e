"""Box algebra: partitions, coverage, the chunk grid, what to read. Integers in, values out; no I/O."""
