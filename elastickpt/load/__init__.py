"""Loading and reading: records, plans, ranged reads, verification. Reading needs no torch."""
