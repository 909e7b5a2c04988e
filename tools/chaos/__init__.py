"""Saves that are cut off: by a power cut, replayed block by block on a real ext4; by SIGKILL of one of several processes.

`python -m tools.chaos power` and `python -m tools.chaos save` print what is left, ours and the peers' side by side.
"""
