"""Test modules beside this one that tests and their processes import by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated_members import close_threads

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)


@pytest.fixture(autouse=True)
def a_writer_process_finds_its_faults_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", HERE)


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    close_threads()
