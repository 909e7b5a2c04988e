"""Loading and reading: what a checkpoint holds, found, read by ranges, and verified. Reading needs no torch."""
