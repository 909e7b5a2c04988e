"""Test modules beside this one that tests and their processes import by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated_members import close_threads

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    close_threads()
