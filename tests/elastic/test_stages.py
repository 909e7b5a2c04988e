"""What a place is given to train, and what is refused of it, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DistributedDataParallel

from elastickpt.elastic.passage import Flush, Passing, flushes_of, order_of, parts_at, sees_batches
from elastickpt.elastic.stages import Place, Stage, Swap, require_parts
from elastickpt.elastic.starts import BatchChanged, Batches, KeptBuffers, digest_of, seed_streams, untouched
from elastickpt.errors import PlacementUnsupported, Refused

HIDDEN = torch.empty(2, 4, device="meta")


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest, self.last = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)


def staged(model: nn.Module, **given: Any) -> Stage:
    given = {"example": (HIDDEN, HIDDEN), **given}
    return Stage(model, given.pop("optimizer", torch.optim.SGD(model.parameters(), lr=0.1)), **given)


def test_names_are_the_modules_though_a_wrapper_is_what_is_called() -> None:
    model = Parts()
    stage = staged(model, embed=model.first, body=nn.Sequential(nn.Identity(), model.rest), head=nn.Sequential(model.last))
    assert {part: list(tensors) for part, tensors in stage.tensors.items()} == {
        "embed": ["first.weight"],
        "body": ["rest.weight", "rest.bias"],
        "head": ["last.weight", "last.bias"],
    }
    assert parts_at(stage, 0, 1) == tuple(stage.parts.values())
    assert parts_at(stage, 1, 3) == (stage.parts["body"],)


def test_without_a_body_the_module_is_it() -> None:
    stage = staged(nn.Linear(4, 4))
    assert list(stage.tensors["body"]) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: staged(m, body=nn.Linear(4, 4)), "'weight' of body is no tensor of module"),
        (lambda m: staged(m, embed=m.first), "without a body"),
        (lambda m: staged(m, body=m.rest, embed=m.first), "'last.weight' of module belongs to none of embed, body"),
        (lambda m: staged(m, body=m, head=m.last), "'last.weight' belongs to body and to head"),
        (lambda m: staged(m, optimizer=torch.optim.SGD(nn.Linear(2, 3).parameters())), "that is none of module's"),
        (lambda m: staged(m, optimizer=torch.optim.LBFGS(m.parameters())), "LBFGS.step needs a closure"),
        (
            lambda m: staged(m, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(m.parameters()))),
            "ReduceLROnPlateau.step needs metrics",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(make: Callable[[Parts], Stage], said: str) -> None:
    with pytest.raises(Refused) as error:
        make(Parts())
    assert said in error.value.message


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_stages_that_are_sharded_or_replicated_are_refused_by_name(alone: DeviceMesh) -> None:
    with pytest.raises(PlacementUnsupported, match="module is a DistributedDataParallel"):
        staged(DistributedDataParallel(nn.Linear(4, 4)))
    model = nn.Linear(4, 4)
    with pytest.raises(PlacementUnsupported, match="optimizer is a ZeroRedundancyOptimizer"):
        staged(model, optimizer=ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1))
    with pytest.raises(PlacementUnsupported, match="'weight' is a DTensor"):
        staged(distribute_module(nn.Linear(4, 4), alone))


@pytest.mark.parametrize(
    ("stage", "stages", "swap", "given", "said"),
    [
        (1, 4, None, {"embed": "first"}, "stage 1 of 4 has embed, which only stages 0 pass"),
        (2, 5, "step", {"head": "last"}, "stage 2 of 5 has head, which only stages 3 and 4 pass"),
        (0, 3, "step", {}, "swap='step' with 3 stages: expected at least 4"),
        (3, 4, None, {"head": "last"}, "expected a loss"),
        (2, 4, "microbatch", {"head": "last"}, "expected a loss"),
        (1, 4, None, {"example": None}, "expected example="),
    ],
)
def test_parts_belong_to_their_places(stage: int, stages: int, swap: Swap | None, given: dict[str, Any], said: str) -> None:
    model = Parts()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parts = {part: getattr(model, name) for part, name in given.items() if name}
    built = staged(model, body=model.rest, **parts, **{key: None for key in given if given[key] is None})
    with pytest.raises(Refused, match=said.split(":")[0]) as error:
        require_parts(built, Place(stage, stages), swap=swap)
    assert said in error.value.message


def test_orders_and_flushes() -> None:
    assert order_of(6, swapped=True) == (1, 0, 2, 3, 5, 4)
    assert flushes_of(Passing(5, swap="microbatch"), step=1, stages=4) == (
        Flush((0, 1, 2, 3), (0, 2, 4)),
        Flush((1, 0, 3, 2), (1, 3)),
    )
    assert flushes_of(Passing(2, swap="step"), step=4, stages=4) == (Flush((0, 1, 2, 3), (0, 1)),)
    assert flushes_of(Passing(2, swap="step"), step=5, stages=4) == (Flush((1, 0, 3, 2), (0, 1)),)
    assert [stage for stage in range(6) if sees_batches(Passing(2, swap="step"), stage, stages=6)] == [0, 1, 4, 5]
    assert [stage for stage in range(6) if sees_batches(Passing(2), stage, stages=6)] == [0, 5]


class Given:
    def __init__(self, *batches: object) -> None:
        self.batches = batches

    def batch(self, step: int) -> object:
        return self.batches[step]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.zeros(4), "expected two tensors"),
        ((torch.zeros(4), 3), "expected two tensors"),
        ((torch.zeros(4), torch.zeros(4), torch.zeros(4)), "expected two tensors"),
        ((torch.zeros(4), torch.zeros(3)), "targets of 3 rows, expected a multiple of microbatches=2"),
        ((torch.zeros(4), torch.zeros(())), "targets of 0 rows"),
    ],
)
def test_batches_are_two_tensors_that_microbatches_divide(batch: object, said: str) -> None:
    """[REC-56]"""
    with pytest.raises(Refused) as error:
        Batches(Given(batch), 2).of(0)
    assert said in error.value.message


def test_a_loader_without_batch_is_refused() -> None:
    with pytest.raises(Refused, match="without batch"):
        Batches([1, 2], 2)


def test_a_batch_of_another_form_than_the_first_one_ends_the_job() -> None:
    """[REC-57]"""
    batches = Batches(Given((torch.zeros(4, 2), torch.zeros(4)), (torch.zeros(4, 3), torch.zeros(4))), 2)
    batches.of(0)
    with pytest.raises(BatchChanged, match=r"batch\(1\) is float32 \(4, 3\).*expected float32 \(4, 2\)"):
        batches.of(1)


def test_digests_tell_bits_shapes_and_types_apart() -> None:
    zeros = torch.zeros(4)
    minus = zeros.clone()
    minus[0] = -0.0
    batches = [(zeros, zeros), (minus, zeros), (zeros.int(), zeros), (zeros.view(2, 2), zeros), (torch.zeros(8)[:4], zeros)]
    digests = [digest_of(one) for one in batches]
    assert len(set(digests[:4])) == 4
    assert digests[4] == digests[0]
    assert digest_of((torch.zeros(2, dtype=torch.bfloat16), torch.zeros(0))) != digests[0]


def test_streams_depend_on_seed_step_and_stage() -> None:
    drawn = set()
    for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 10), (0, 11, 0)):
        seed_streams(*numbers)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 6
    seed_streams(0, 0, 0)
    again = torch.rand(1).item()
    seed_streams(0, 0, 0)
    assert torch.rand(1).item() == again


def test_an_evaluation_leaves_no_trace() -> None:
    """[REC-53]"""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].eval()
    before, drawn = {name: one.clone() for name, one in model.state_dict().items()}, torch.random.get_rng_state()
    mean = model[0].running_mean
    with untouched(model):
        assert not model[0].training
        model[0].train()
        model(torch.rand(8, 4))
        model[0].running_mean = torch.ones(4)
    assert [one.training for one in model] == [True, False]
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert model[0].running_mean is mean
    assert torch.equal(drawn, torch.random.get_rng_state())


def test_buffers_are_put_back_whole() -> None:
    model = nn.BatchNorm1d(4)
    kept: dict[str, Tensor] = {name: one.clone() for name, one in model.named_buffers()}
    buffers = KeptBuffers(model)
    model(torch.rand(8, 4))
    buffers.put_back()
    assert all(torch.equal(kept[name], one) for name, one in model.named_buffers())
