"""Test modules that rank processes import by name lie beside their tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent / "convert"))
sys.path.insert(0, str(Path(__file__).parent / "harness"))
sys.path.insert(0, str(Path(__file__).parent / "foreign"))
sys.path.insert(0, str(Path(__file__).parent / "ranks"))
sys.path.insert(0, str(Path(__file__).parent / "runs"))
sys.path.insert(0, str(Path(__file__).parent / "save"))
sys.path.insert(0, str(Path(__file__).parent / "elastic"))

# What a property states holds however long a busy machine takes over an example.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# Hundreds of processes import the package: what one has compiled is kept for the others, whatever the environment says.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A child of a fork has no threads of OpenMP but waits for them, where its parent has begun some. Torch is imported behind this.
os.environ["OMP_NUM_THREADS"] = "1"

MANY = 200  # descriptors


def pytest_collectstart() -> None:
    """Nothing of what is imported and collected is garbage: while it grows it is not looked through."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Nor by any collection of garbage later on."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder that is in memory where that is possible."""
    from memory_folder import memory_folder

    with memory_folder(tmp_path) as folder:
        yield folder


@pytest.fixture(autouse=True, scope="module")
def no_descriptors_are_left() -> Iterator[None]:
    """A saver has a writer for each store that it saw; objects in cycles are collected late in a process with so many."""
    yield
    from elastickpt.saving.async_save import close_all

    close_all()
    if len(os.listdir("/proc/self/fd")) > MANY:
        gc.collect()
