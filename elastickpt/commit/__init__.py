"""The commit of a checkpoint: drafts, attestations, the proof that all is there, how the writers of a job decide, and the one
moment when it exists.
"""
