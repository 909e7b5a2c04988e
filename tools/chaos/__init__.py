"""Saves that are cut off: by a power cut, replayed block by block on a real ext4; by SIGKILL of one of several processes.
And checkpoints of which one bit is flipped.

`python -m tools.chaos power`, `save` and `flips` print what is left of them, ours and the peers' side by side.
"""
