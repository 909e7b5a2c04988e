"""Code of one rank that would communicate is stopped before it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from elastickpt.errors import ValueNotCarried
from elastickpt.training.entries import collectives_refused


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gather_objects() -> None:
    dist.all_gather_object([None], "x")


COLLECTIVES: dict[str, Callable[[], Any]] = {
    "all_reduce": lambda: dist.all_reduce(torch.ones(2)),
    "broadcast": lambda: dist.broadcast(torch.ones(2), 0),
    "barrier": dist.barrier,
    "all_gather_object": gather_objects,
}


@pytest.mark.parametrize("collective", COLLECTIVES.values(), ids=COLLECTIVES.keys())
def test_a_collective_is_stopped_before_it_begins(group: None, collective: Callable[[], Any]) -> None:
    with pytest.raises(ValueNotCarried, match="the hook of X starts a collective"), collectives_refused("the hook of X"):
        collective()
    collective()


@pytest.fixture
def pretended_group() -> Iterator[None]:
    """Two ranks, one of which is pretended: nothing is sent."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_gathering_a_dtensor_is_a_collective_and_reading_its_shard_is_none(pretended_group: None) -> None:
    mesh = init_device_mesh("cpu", (2,))
    tensor = distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None)
    with collectives_refused("a hook"):
        assert tensor.to_local().sum().item() == 2.0
        assert (tensor + 1).to_local().sum().item() == 4.0
    with pytest.raises(ValueNotCarried, match="a hook starts a collective"), collectives_refused("a hook"):
        tensor.full_tensor()


def test_without_a_process_group_nothing_is_looked_at() -> None:
    with collectives_refused("a hook"):
        assert torch.ones(2).sum().item() == 2.0
