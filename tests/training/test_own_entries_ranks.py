"""What only state dicts and extra states have, of 2 ranks: back on 2, and on others where all ranks had it alike."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import elastickpt as ek
from elastickpt.errors import StateMismatch
from tools.gloo_ranks import run_ranks

pytestmark = pytest.mark.ranks

WAYS = ("plain", "ddp", "fully_shard")
LARGE = (200, 100)  # above what stands inside a value


class Metric(nn.Module):
    """Has entries of its state dict by overrides, small and large, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.total, self.table, self.extra = 0, torch.zeros(LARGE), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}total"], destination[f"{prefix}table"] = self.total, self.table

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.total, self.table = state_dict.pop(f"{prefix}total"), state_dict.pop(f"{prefix}table")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def get_extra_state(self) -> object:
        return {"extra": self.extra, "table": torch.full(LARGE, float(self.extra))}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state["extra"]
        assert torch.equal(state["table"], torch.full(LARGE, float(self.extra)))


class Counting(torch.optim.SGD):
    """Has an entry of its state dict with a small part and a large one."""

    count, seen = 0, torch.zeros(LARGE)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mine": {"count": self.count, "seen": self.seen}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        mine = state_dict["mine"]
        self.count, self.seen = mine["count"], mine["seen"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "mine"})


def _state(way: str, world_size: int, mark: int) -> tuple[dict[str, Any], Metric, Counting]:
    model = nn.Sequential(Metric())
    metric: Any = model[0]
    metric.total, metric.table, metric.extra = mark, torch.full(LARGE, float(mark)), mark
    wrapped: nn.Module = model
    if way == "ddp" and world_size > 1:
        wrapped = DistributedDataParallel(model)
    if way == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = Counting(model.parameters(), lr=0.1)
    optimizer.count, optimizer.seen = mark, torch.full(LARGE, float(mark))
    return {"m": wrapped, "o": optimizer}, metric, optimizer


def saved(rank: int, world_size: int, root: str) -> None:
    for way in WAYS:
        ek.save(_state(way, world_size, 7)[0], f"{root}/{way}/alike")
        ek.save(_state(way, world_size, 7 + rank)[0], f"{root}/{way}/apart")


def loaded(rank: int, world_size: int, root: str) -> list[tuple[list[float], str]]:
    """What is live after a load, of each way saved alike, then of each saved apart; and what the load says if it is refused."""
    found = []
    for which, way in itertools.product(("alike", "apart"), WAYS):
        state, metric, optimizer = _state(way, world_size, 0)
        message = ""
        try:
            assert ek.load(state, f"{root}/{way}/{which}").notes == ()
        except StateMismatch as refusal:
            message = str(refusal)
        marks = (metric.total, metric.table.mean().item(), metric.extra, optimizer.count, optimizer.seen.mean().item())
        found.append((list(map(float, marks)), message))
    return found


def test_own_entries_come_back_where_they_belong_and_elsewhere_if_all_ranks_had_them_alike(tmp_path: Path) -> None:
    """[UCF-141, UCF-152]"""
    run_ranks(saved, 2, str(tmp_path))
    for world_size in (1, 2, 3):
        for rank, found in enumerate(run_ranks(loaded, world_size, str(tmp_path))):
            alike, apart = found[: len(WAYS)], found[len(WAYS) :]
            assert alike == [([7.0] * 5, "")] * len(WAYS)
            if world_size == 2:
                assert apart == [([7.0 + rank] * 5, "")] * len(WAYS)
                continue
            for marks, message in apart:
                assert marks == [0.0] * 5
                assert "4 differences" in message
                for place in ("/m/0.total", "/m/0.table", "/m/0: value", "/o/mine"):
                    assert place in message
