"""Test modules that rank processes import by name lie beside their tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from elastickpt.saving.async_save import close_all

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

# A child of a fork has no threads of OpenMP but waits for them, where its parent has begun some.
torch.set_num_threads(1)

MANY = 200  # descriptors


@pytest.fixture(autouse=True, scope="module")
def no_descriptors_are_left() -> Iterator[None]:
    """A saver has a writer for each store that it saw; objects in cycles are collected late in a process with so many."""
    yield
    close_all()
    if len(os.listdir("/proc/self/fd")) > MANY:
        gc.collect()
