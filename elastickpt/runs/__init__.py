"""A run and its history: commits, epochs, the live branch, what is kept. Rules over small objects on a store; no torch."""
