"""Dicts of DTensors are bound in columns: on each rank of a mesh the elements that torch itself has there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from memory_checkpoint import MemoryCheckpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from elastickpt.errors import LayoutUnsupported
from elastickpt.training.capture import capture
from elastickpt.training.listing import Binding
from elastickpt.training.restore import bind, hold_models

PLACEMENTS: dict[str, tuple[Any, Any]] = {
    "rows": (Shard(0), Replicate()),
    "columns": (Replicate(), Shard(1)),
    "both": (Shard(0), Shard(1)),
    "rows twice": (Shard(0), Shard(0)),
    "whole": (Replicate(), Replicate()),
}
SHAPES = {"even": (8, 4), "uneven": (5, 3), "few": (1, 2), "deep": (4, 2, 3)}
RANKS = 4


def wholes() -> dict[str, torch.Tensor]:
    made = {f"{kind} {way}": torch.rand(shape) for kind, shape in SHAPES.items() for way in PLACEMENTS}
    return {**made, "point": torch.tensor(7.0), "half": torch.rand(6, 2).bfloat16(), "complex": torch.rand(4, 2) * 1j}


def placements_of(name: str) -> tuple[Any, Any]:
    return PLACEMENTS.get(name.partition(" ")[2], (Replicate(), Shard(0)) if name != "point" else (Replicate(), Replicate()))


@contextmanager
def mesh_of(rank: int) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    finally:
        dist.destroy_process_group()


def placed(tensors: dict[str, torch.Tensor], mesh: DeviceMesh) -> dict[str, DTensor]:
    return {
        name: distribute_tensor(one.clone(), mesh, placements_of(name), src_data_rank=None) for name, one in tensors.items()
    }


def bound(saved: dict[str, torch.Tensor], live: dict[str, Any], rank: int) -> tuple[MemoryCheckpoint, Binding]:
    checkpoint = MemoryCheckpoint([capture({"state": saved}, rank=0, world_size=1, declared=None)])
    held = hold_models({"state": live}, rank=rank, world_size=RANKS, declared=None)
    return checkpoint, bind(held, checkpoint.listing(world_size=RANKS))


@pytest.mark.parametrize("rank", range(RANKS))
def test_each_rank_gets_what_torch_has_there(rank: int) -> None:
    saved = wholes()
    with mesh_of(rank) as mesh:
        expected = placed(saved, mesh)
        live = placed({name: torch.zeros_like(one) for name, one in saved.items()}, mesh)
        before = {name: one._version for name, one in live.items()}
        checkpoint, binding = bound(saved, live, rank)
        assert (binding.targets, binding.mismatches) == ((), ())
        assert sorted(place for many in binding.columns for place in many.places.tolist()) == list(range(len(saved)))
        checkpoint.fill(binding)
        for name, one in live.items():
            assert torch.equal(one._local_tensor, expected[name]._local_tensor), name
            assert one._version > before[name], name
        keys = [id_.name for id_ in sorted(checkpoint.specs, key=str)]
        alone = {keys[place]: many.held_alone for many in binding.columns for place in many.places.tolist()}
        assert alone == {name: not any(one.is_replicate() for one in placements_of(name)) for name in saved}


def _by_columns(live: dict[str, Any], mesh: DeviceMesh) -> None:
    local = torch.zeros(8, 4).t().contiguous().t()
    live["even whole"] = DTensor.from_local(local, mesh, (Replicate(), Replicate()), run_check=False)


def _a_plain_one(live: dict[str, Any], mesh: DeviceMesh) -> None:
    live["even whole"] = torch.zeros(8, 4)


@pytest.mark.parametrize("change", [_by_columns, _a_plain_one])
def test_where_more_is_to_be_said_of_one_each_is_bound_by_itself(change: Callable[[dict[str, Any], DeviceMesh], None]) -> None:
    saved = wholes()
    with mesh_of(3) as mesh:
        expected = placed(saved, mesh)
        live: dict[str, Any] = dict(placed({name: torch.zeros_like(one) for name, one in saved.items()}, mesh))
        change(live, mesh)
        checkpoint, binding = bound(saved, live, 3)
        assert (binding.mismatches, len(binding.targets)) == ((), len(saved))
        checkpoint.fill(binding)
        for name, one in live.items():
            own = one._local_tensor if isinstance(one, DTensor) else one
            assert torch.equal(own, expected[name]._local_tensor if isinstance(one, DTensor) else saved[name]), name


def test_another_shape_in_the_checkpoint_is_named() -> None:
    saved = wholes()
    with mesh_of(1) as mesh:
        live = placed(saved, mesh)
        _, binding = bound({**saved, "even rows": torch.zeros(9, 4)}, live, 1)
        (found,) = binding.mismatches
        assert (found.name, found.what, found.expected, found.found) == ("extra/state/even rows", "shape", "(8, 4)", "(9, 4)")


def test_a_sum_that_is_still_to_be_reduced_is_refused() -> None:
    saved = {"a": torch.zeros(4), "b": torch.zeros(4)}
    with mesh_of(0) as mesh:
        live = placed(saved, mesh)
        live["b"] = DTensor.from_local(torch.zeros(4), mesh, (Partial(), Replicate()), run_check=False)
        with pytest.raises(LayoutUnsupported, match="still to be reduced"):
            bound(saved, live, 0)
