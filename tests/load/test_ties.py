"""Apart in the checkpoint, one tensor in this process: the one that is not read must have had the same contents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import elastickpt as ek
from elastickpt.errors import CheckpointError, StateMismatch
from tools.gloo_ranks import run_ranks


class Language(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


def untied(*, equal: bool) -> Language:
    torch.manual_seed(0)
    model = Language(tied=False)
    if equal:
        model.head.weight.data.copy_(model.embed.weight.data)
    return model


def test_a_head_that_differs_is_a_mismatch_and_nothing_changes(tmp_path: Path) -> None:
    ek.save({"m": untied(equal=False)}, tmp_path / "c")
    live = Language(tied=True)
    before = live.embed.weight.clone()
    for strict in ("all", "unexpected"):
        with pytest.raises(StateMismatch, match=r"params/m/head.weight/value: value: expected the contents of params/m/embed"):
            ek.load({"m": live}, tmp_path / "c", strict=strict)
    assert live.embed.weight.equal(before)
    report = ek.load({"m": live}, tmp_path / "c", strict="missing")
    assert any("head.weight/value is not read" in note for note in report.notes)
    assert not live.embed.weight.equal(before)


def test_a_head_that_is_equal_is_no_difference(tmp_path: Path) -> None:
    saved = untied(equal=True)
    ek.save({"m": saved}, tmp_path / "c")
    live = Language(tied=True)
    ek.load({"m": live}, tmp_path / "c")
    assert live.head.weight.equal(saved.head.weight)
    assert live.head.weight is live.embed.weight


def sharded(rank: int, world_size: int, folder: str) -> str:
    live = Language(tied=True)
    fully_shard(live)
    try:
        ek.load({"m": live}, Path(folder) / "c")
    except CheckpointError as error:
        return f"{error.kind}: {error.message}"
    return "loaded"


@pytest.mark.ranks
@pytest.mark.parametrize("equal", [True, False])
def test_shards_are_compared_by_the_rank_that_has_them(tmp_path: Path, equal: bool) -> None:
    saved = untied(equal=True)
    if not equal:
        saved.head.weight.data[-1, -1] += 1.0  # the last rank's
    ek.save({"m": saved}, tmp_path / "c")
    found = run_ranks(sharded, 2, str(tmp_path))
    assert found == ["loaded"] * 2 if equal else all("state-mismatch: rank 1" in text for text in found)
