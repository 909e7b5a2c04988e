"""Folders in memory, for tests that a disk must not hold up: those with short limits, and those of hundreds of saves."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TURNS = 100  # of removing: the writer of a save that a test gave up may still make files there


@contextmanager
def memory_folder(otherwise: Path) -> Iterator[Path]:
    """A new folder, in memory where the machine has such a place, which is gone afterwards."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else otherwise
    folder = Path(tempfile.mkdtemp(dir=place, prefix="elastickpt-"))
    try:
        yield folder
    finally:
        for _ in range(TURNS):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
        else:
            shutil.rmtree(folder)
