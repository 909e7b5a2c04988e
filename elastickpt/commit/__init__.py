"""The commit of a checkpoint: drafts, attestations, the proof that all is there, and the one moment when it exists."""
