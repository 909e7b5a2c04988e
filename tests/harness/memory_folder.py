"""Folders in memory, for tests that a disk must not hold up: those with short limits, and those of hundreds of saves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_folder(otherwise: Path) -> Iterator[Path]:
    """A new folder, in memory where the machine has such a place, which is gone afterwards."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else otherwise
    with tempfile.TemporaryDirectory(dir=place, prefix="elastickpt-") as folder:
        yield Path(folder)
