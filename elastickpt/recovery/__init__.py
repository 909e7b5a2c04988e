"""Recovery of lost workers. Its place is kept; it is not built yet."""
