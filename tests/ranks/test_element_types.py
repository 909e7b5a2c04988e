"""Every element type between real ranks, in uneven, empty and 0-d parts: bit for bit at another layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from element_types import DTYPES, SHAPES, bits, load_types, save_types

import elastickpt as ek
from tools.gloo_ranks import run_ranks

pytestmark = pytest.mark.ranks
WORLD = {"fsdp3": 3, "tp2": 2, "single": 1}


def test_every_element_type_goes_to_other_ranks_bitwise(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    nbytes = sum(bits("", shape, dtype).nbytes for shape in SHAPES.values() for dtype in DTYPES)
    assert run_ranks(save_types, 3, "fsdp3", path) == [nbytes] * 3
    for layout in ("single", "tp2", "fsdp3"):
        assert run_ranks(load_types, WORLD[layout], layout, path) == [[]] * WORLD[layout], layout


@pytest.mark.long
def test_every_element_type_comes_back_from_columns_bitwise(tmp_path: Path) -> None:
    """From TP2 to the others; the library's own reader sees the same bits."""
    path = str(tmp_path / "c")
    run_ranks(save_types, 2, "tp2", path)
    for layout in ("single", "tp2", "fsdp3"):
        assert run_ranks(load_types, WORLD[layout], layout, path) == [[]] * WORLD[layout], layout
    opened = ek.open(path)
    assert opened.verify().sound
    assert len(opened.records) == len(SHAPES) * len(DTYPES)
    for identity, record in opened.records.items():
        name, dtype = identity.name.replace("~1", "/"), getattr(torch, record.spec.dtype)
        wanted = bits(name, record.spec.shape, dtype)
        assert opened.read(identity).tobytes() == wanted.reshape(-1).view(torch.uint8).numpy().tobytes(), name
