"""State that exists only through a module's own state dict, on several ranks: kept per rank, sharded modules, communication."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from own_ways import Derived, Metric, Old, Renames
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import elastickpt as ek
from elastickpt.errors import CheckpointError
from tools.gloo_ranks import run_ranks

pytestmark = pytest.mark.ranks


class Net(nn.ModuleDict):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self["lin"](x)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net({"lin": nn.Linear(4, 4), "derived": nn.Sequential(Derived("override")), "metric": Metric()})


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        fully_shard(model.lin)
        fully_shard(model)
    return model


def inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def kept(rank: int, world_size: int, folder: str, kind: str, differing: bool) -> list[float]:
    model, live = wrapped(kind, net(0)), wrapped(kind, net(1))
    inner(model).metric.total = torch.tensor(5.0 + rank * differing)
    ek.save({"m": model}, Path(folder) / "c")
    before = list(live.parameters())
    ek.load({"m": live}, Path(folder) / "c")
    assert all(one is other for one, other in zip(before, live.parameters(), strict=True))
    norm = inner(live).derived[0].weight
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    assert whole.shape == (2, 2)
    return [inner(live).metric.total.item(), Metric.total.item()]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("differing", [False, True])
def test_each_rank_gets_its_own_back_on_the_same_layout(tmp_path: Path, kind: str, differing: bool) -> None:
    """What differs is refused elsewhere, what does not goes to any layout. [UCF-141]"""
    found = run_ranks(kept, 2, str(tmp_path), kind, differing)
    assert found == [[5.0, 0.0], [6.0 if differing else 5.0, 0.0]]
    alone = net(2)
    if differing:
        with pytest.raises(CheckpointError, match=r"/m/metric.total: value: expected one entry 'metric.total'"):
            ek.load({"m": alone}, tmp_path / "c")
        assert alone["metric"].total.item() == 0.0
    else:
        ek.load({"m": alone}, tmp_path / "c")
        assert alone["metric"].total.item() == 5.0
        assert alone["derived"][0].norm == alone["derived"][0].weight.norm().item()


def takes(rank: int, world_size: int, folder: str) -> float:
    live = wrapped("fsdp", net(1))
    ek.load({"m": live}, Path(folder) / "c")
    return live.metric.total.item()


def test_one_process_to_two_and_ranks_without_the_entry(tmp_path: Path) -> None:
    model = net(0)
    model["metric"].total = torch.tensor(3.0)
    ek.save({"m": model}, tmp_path / "c")
    assert run_ranks(takes, 2, str(tmp_path)) == [3.0, 3.0]


def unexpected(rank: int, world_size: int, folder: str) -> str:
    ek.save({"m": wrapped("ddp", net(0))}, Path(folder) / "c")
    other = net(1)
    other["metric"] = nn.Module()
    try:
        ek.load({"m": DistributedDataParallel(other)}, Path(folder) / "c")
    except CheckpointError as error:
        return f"{error.kind}: {error.message}"
    return "loaded"


def test_an_entry_of_each_rank_that_no_rank_has_a_place_for_is_named(tmp_path: Path) -> None:
    for text in run_ranks(unexpected, 2, str(tmp_path)):
        assert text.startswith("state-mismatch")
        assert "/m/metric.total@per-rank: unexpected" in text


def renamed(rank: int, world_size: int, folder: str) -> bool:
    torch.manual_seed(0)
    old, new = Old(), Renames()
    fully_shard(old)
    fully_shard(new)
    ek.save({"m": old}, Path(folder) / "c")
    weight = new.new.weight
    ek.load({"m": new}, Path(folder) / "c")
    return new.new.weight is weight and bool(weight.full_tensor().equal(old.old.weight.full_tensor()))


def test_a_hook_that_renames_is_followed_on_shards(tmp_path: Path) -> None:
    assert run_ranks(renamed, 2, str(tmp_path)) == [True, True]


class Summed(Metric):
    """Its state dict adds up what all ranks have, as metric libraries offer it; or its loading does."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.where == "saving":
            dist.all_reduce(self.total)
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.where == "loading":
            dist.barrier()
        super()._load_from_state_dict(*args)


def communicates(rank: int, world_size: int, folder: str, where: str) -> tuple[str, bool]:
    """Only rank 0 has the module, so that a collective that began would hang."""
    path = Path(folder) / "c"
    model = {"metric": Summed(where) if rank == 0 else Metric(), "lin": nn.Linear(1, 1)}
    try:
        ek.save({"m": nn.ModuleDict(model)}, path, mesh=dist.init_device_mesh("cpu", (world_size,)))
        ek.load({"m": nn.ModuleDict(model)}, path)
    except CheckpointError as error:
        return f"{error.kind}: {error.message}", path.exists()
    return "passed", True


def test_saving_and_loading_never_begin_a_collective(tmp_path: Path) -> None:
    for text, exists in run_ranks(communicates, 2, str(tmp_path / "a"), "saving"):
        assert text.startswith("value-not-carried: rank 0: the state dict of module 'metric' (Summed) starts a collective")
        assert "c10d::allreduce_" in text
        assert not exists
    for text, _ in run_ranks(communicates, 2, str(tmp_path / "b"), "loading"):
        assert text.startswith("value-not-carried: rank 0: the loading of the model (ModuleDict) starts a collective")
        assert "changed already" in text
