"""Saving: what live state becomes a checkpoint, agreed by all ranks, written, and committed."""
