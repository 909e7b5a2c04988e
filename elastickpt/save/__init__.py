"""Saving: plan, stage, write, commit."""
