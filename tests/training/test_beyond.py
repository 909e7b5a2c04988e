"""What is known by its memory, and code of one rank that would communicate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from elastickpt.errors import ValueNotCarried
from elastickpt.training.beyond import Known, memory_of, tensors_in
from elastickpt.training.local_only import collectives_refused


def test_a_tensor_is_known_by_its_elements_in_whatever_shape() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    known = Known([tensor])
    assert known.has(tensor)
    assert known.has(tensor.detach().view(4, 3))
    assert known.has(torch.nn.Parameter(tensor))
    assert not known.has(tensor.clone())
    assert not known.has(tensor[:2])
    assert not known.has(tensor.view(torch.int32))


def test_an_empty_tensor_is_known_by_identity_only() -> None:
    one, other = torch.empty(0), torch.empty(0)
    assert memory_of(one) is None
    assert Known([one]).has(one)
    assert not Known([one]).has(other)


def test_the_memory_of_a_composite_tensor_is_that_of_its_parts() -> None:
    two = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    a, b = torch.zeros(2), torch.zeros(2)
    known = Known([two(a, b)])
    assert known.has(two(a, b))
    assert not known.has(two(b, a))


def test_tensors_are_found_in_nested_containers() -> None:
    one, other = torch.zeros(1), torch.zeros(2)
    assert list(tensors_in({"a": [one, 3], "b": ({"c": other},)})) == [one, other]


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
