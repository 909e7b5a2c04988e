"""What FSDP2 does to the parameters that a module shows, FSDP1's refusal, and other wrappers of two real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_models import cut, filled, mlp
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.arrays import Box
from elastickpt.training.dtensors import JobView
from elastickpt.training.held import HeldArray
from elastickpt.training.modules import hold_module
from elastickpt.training.parameters import Identities
from tools.gloo_ranks import run_ranks

pytestmark = pytest.mark.ranks


def held_of(model: nn.Module, rank: int) -> tuple[HeldArray, ...]:
    return hold_module("model", model, job=JobView(rank, 2), identities=Identities()).arrays


def _gathered(rank: int, world_size: int) -> dict[str, Any]:
    model = fully_shard(nn.Linear(3, 5, bias=False), reshard_after_forward=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ones = torch.ones(1, 3)
    with torch.no_grad():
        model(ones)
    shows_shards = isinstance(model.weight, DTensor)
    identities = Identities()
    held = hold_module("model", model, job=JobView(rank, world_size), identities=identities)
    known = identities.find(optimizer.param_groups[0]["params"][0])
    held.arrays[0].tensor.fill_(2.0)
    with torch.no_grad():
        before = model(ones).tolist()
        held.reshard()
        after = model(ones).tolist()
    return {"shows_shards": shows_shards, "known": known and known.name, "stale": before != after, "after": after}


def test_a_gathered_module_is_held_as_its_shards_and_takes_what_is_loaded_after_a_reshard() -> None:
    expected = {"shows_shards": False, "known": "weight", "stale": True, "after": [[6.0] * 5]}
    assert run_ranks(_gathered, 2) == [expected] * 2


def _variants(rank: int, world_size: int) -> dict[str, tuple[HeldArray, ...]]:
    columns = fully_shard(mlp(4, 6), shard_placement_fn=lambda p: Shard(p.ndim - 1))
    tied = mlp(4, 4)
    tied[2].weight = tied[0].weight
    tied[0].bias.requires_grad_(requires_grad=False)
    partly = mlp(4, 6)
    return {
        "columns": held_of(columns, rank),
        "tied": held_of(fully_shard(tied), rank),
        "nested": held_of(fully_shard(nn.Sequential(*(fully_shard(layer) for layer in mlp(4, 6)))), rank),
        "ignoring": held_of(fully_shard(partly, ignored_params={partly[1].weight}), rank),
        "replicate": held_of(replicate(mlp(4, 6), mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))), rank),
        "buffers": held_of(fully_shard(filled(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))), rank),
    }


def test_shards_of_other_axes_tied_frozen_nested_ignored_and_replicated_parameters() -> None:
    ranks = run_ranks(_variants, 2)
    for held in ranks:
        for label, arrays in held.items():
            for array in arrays:
                if label != "tied":
                    name = array.spec.id.name
                    assert torch.equal(array.tensor.float(), cut(name, array.spec.shape, array.box)), (label, name)
    first, second = ranks
    assert [a.box for a in (first["columns"][4], second["columns"][4])] == [Box((0, 0), (4, 3)), Box((0, 3), (4, 6))]
    assert [a.spec.id.name for a in first["tied"]] == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    assert [a.spec.id.name for a in first["nested"]] == [a.spec.id.name for a in first["columns"]]
    assert [a.sharing for a in first["ignoring"]] == ["placed", "placed", "undeclared", *["placed"] * 3]
    assert {(a.sharing, a.placements) for a in first["replicate"]} == {("placed", ("R",))}
    assert [(a.sharing, a.role, a.replicas, a.kept) for a in first["buffers"][4:]] == [
        ("declared", "buffer", (0, 1), "loose")
    ] * 3


def _flat(rank: int, world_size: int) -> list[str]:
    whole = FullyShardedDataParallel(
        mlp(4, 6), sharding_strategy=ShardingStrategy.NO_SHARD, use_orig_params=True, device_id=torch.device("cpu")
    )
    names = [array.spec.id.name for array in held_of(whole, rank)]
    with pytest.raises(LayoutUnsupported) as caught:
        held_of(FullyShardedDataParallel(mlp(4, 6), use_orig_params=True, device_id=torch.device("cpu")), rank)
    return [*names, caught.value.message]


@pytest.mark.filterwarnings("ignore")
def test_flat_shards_are_refused_and_what_to_use_is_said() -> None:
    *names, message = run_ranks(_flat, 2)[0]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert "'0.weight' stands under FullyShardedDataParallel (FULL_SHARD)" in message
    assert "fully_shard" in message
