"""Dicts of tensors whose keys differ between ranks, as state dicts of pipeline stages do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tools.gloo_ranks import run_ranks


def _state(rank: int, world_size: int, fill: float) -> dict[str, Any]:
    """Eight layers, split over the ranks; each has its own keys, and all have `step`."""
    mine = range(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    weights = {f"layers.{n}.w": torch.full((4, 3), fill * n if fill else -1.0) for n in mine}
    return {"model": {"weights": weights, "step": 5 if fill else 0}}


def save_stages(rank: int, world_size: int, path: str) -> None:
    import elastickpt as ek

    for turn in range(2):  # the second save knows the structure
        ek.save(_state(rank, world_size, 1.0), f"{path}-{turn}")


def load_stages(rank: int, world_size: int, path: str) -> bool:
    import elastickpt as ek

    state = _state(rank, world_size, 0.0)
    ek.load(state, f"{path}-1")
    wanted = _state(rank, world_size, 1.0)
    equal = all(torch.equal(state["model"]["weights"][k], w) for k, w in wanted["model"]["weights"].items())
    return equal and state["model"]["step"] == 5


def load_too_little(rank: int, world_size: int, path: str) -> str:
    import elastickpt as ek

    state = _state(rank, world_size, 0.0)
    state["model"]["weights"].pop("layers.0.w", None)
    try:
        ek.load(state, f"{path}-1")
    except ek.errors.StateMismatch as error:
        return str(error)
    return "loaded"


@pytest.mark.ranks
def test_keys_that_differ_between_ranks_are_joined_and_split_again(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    run_ranks(save_stages, 2, path)
    for world_size in (1, 2, 4):
        assert run_ranks(load_stages, world_size, path) == [True] * world_size
    found = run_ranks(load_too_little, 2, path)
    assert len(set(found)) == 1
    assert "extra/model/weights/layers.0.w: unexpected" in found[0]
