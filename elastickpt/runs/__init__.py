"""A run of a job: it claims an epoch, restores, saves when a save is due, and keeps what its rules say. No torch."""
