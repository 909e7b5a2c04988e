"""Test modules beside this one that tests and their processes import by name."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated_members import close_threads

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: for hundreds of saves that sync."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="elastickpt-") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    close_threads()
