"""Optimizer states of sharded models, on real gloo ranks: boxed as a hand would slice, loaded at other layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fingerprint import fingerprint
from memory_checkpoint import MemoryCheckpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from elastickpt.errors import LayoutUnsupported, StateMismatch
from elastickpt.format.arrays import ArrayId, Box
from elastickpt.training.capture import capture
from elastickpt.training.restore import bind, hold_models
from tools.gloo_ranks import run_ranks

pytestmark = pytest.mark.ranks

State = dict[str, Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def single(model: Net, world_size: int) -> nn.Module:
    return model


def fsdp(model: Net, world_size: int) -> nn.Module:
    fully_shard(model.up, mesh=(mesh := init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))))
    return fully_shard(model, mesh=mesh)


def hsdp(model: Net, world_size: int) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("rep", "shard")))


def tp(model: Net, world_size: int) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)), PLAN)


def tp_fsdp(model: Net, world_size: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], PLAN)
    return fully_shard(model, mesh=mesh["dp"])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    groups = [[p for p in model.parameters() if (p.ndim == 1) is flat] for flat in (True, False)]
    return torch.optim.AdamW([{"params": groups[0], "lr": 0.01}, {"params": groups[1], "lr": 0.02}])


class Factored(torch.optim.Optimizer):
    """States that are DTensors of another shape than their parameter: one row mean each, and column means."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.01})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                squared = p.grad.square()
                state = self.state[p]
                new = {"row": squared.mean(dim=-1, keepdim=True), "col": squared.mean(dim=0, keepdim=True)}
                for key, mean in new.items():
                    mean = mean.redistribute(placements=[Replicate()])
                    state[key] = mean if key not in state else state[key].lerp_(mean, 0.5)
                p.data.sub_(p.grad / (state["row"] * state["col"] + 1.0) * group["lr"])


Layout = Callable[[Net, int], nn.Module]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def make_state(layout: Layout, world_size: int, seed: int, make: MakeOptimizer = adamw) -> State:
    torch.manual_seed(seed)
    model = layout(Net(), world_size)
    optimizer = make(model)
    return {"model": model, "optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def train(state: State, steps: int) -> None:
    source = torch.Generator().manual_seed(5)
    for _ in range(steps):
        state["model"](torch.randn(4, 6, generator=source)).square().mean().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        state["scheduler"].step()


def train_by_hand(state: State, steps: int) -> None:
    """Gradients without a forward, which torch has not for unevenly column-parallel layers."""
    for _ in range(steps):
        for parameter in state["model"].parameters():
            parameter.grad = parameter.detach() * 0.5 + 0.125
        state["optimizer"].step()
        state["scheduler"].step()


def saved(state: State, rank: int, world_size: int) -> MemoryCheckpoint:
    """The checkpoint of all ranks, on every rank."""
    live = capture(state, rank=rank, world_size=world_size, declared=None)
    every: list[Any] = [None] * world_size
    dist.all_gather_object(every, live)
    return MemoryCheckpoint(every)


def load(checkpoint: MemoryCheckpoint, state: State, rank: int, world_size: int) -> None:
    listing = checkpoint.listing(world_size=world_size)
    checkpoint.fill(bind(hold_models(state, rank=rank, world_size=world_size, declared=None), listing))


def boxes(rank: int, world_size: int) -> dict[tuple[str, str], Box]:
    state = make_state(fsdp, world_size, 0)
    train(state, 1)
    weight = state["model"].up.weight
    assert isinstance(state["optimizer"].state[weight]["exp_avg"], DTensor)
    live = capture(state, rank=rank, world_size=world_size, declared=None)
    assert all(held.role == "parameter" and held.sharing == "placed" for held in live.arrays)
    return {(held.spec.id.name, held.spec.id.state): held.box for held in live.arrays}


def test_boxes_of_states_are_those_of_their_parameter_sliced_by_hand() -> None:
    """`torch.chunk` of 10 rows over 4 ranks: 3, 3, 3, 1; of 5 rows: 2, 2, 1, 0."""
    for rank, found in enumerate(run_ranks(boxes, 4)):
        up, down = [(0, 3), (3, 6), (6, 9), (9, 10)][rank], [(0, 2), (2, 4), (4, 5), (5, 5)][rank]
        for state in ("value", "exp_avg", "exp_avg_sq"):
            assert found["up.weight", state] == Box((up[0], 0), (up[1], 6))
            assert found["down.weight", state] == Box((down[0], 0), (down[1], 10))
            assert found["down.bias", state] == Box((down[0],), (down[1],))


def restored_alike(rank: int, world_size: int, layout: Layout, make: MakeOptimizer) -> None:
    original = make_state(layout, world_size, 0, make)
    train(original, 2)
    checkpoint = saved(original, rank, world_size)
    fresh, stepped = make_state(layout, world_size, 1, make), make_state(layout, world_size, 2, make)
    train(stepped, 1)
    for other in (fresh, stepped):
        load(checkpoint, other, rank, world_size)
    expected = fingerprint(original)
    assert fingerprint(stepped) == expected
    assert fingerprint(fresh) == expected
    train(original, 1)
    train(fresh, 1)
    assert fingerprint(fresh) == fingerprint(original)


@pytest.mark.parametrize(
    ("layout", "world_size", "make"),
    [(fsdp, 3, adamw), (tp, 2, adamw), (tp_fsdp, 4, adamw), (hsdp, 4, adamw), (fsdp, 2, Factored)],
)
def test_a_sharded_optimizer_is_restored_and_goes_on_alike(layout: Layout, world_size: int, make: MakeOptimizer) -> None:
    run_ranks(restored_alike, world_size, layout, make)


def resharded(rank: int, world_size: int) -> None:
    for source, target in ((fsdp, tp_fsdp), (tp_fsdp, fsdp), (hsdp, tp), (tp, single)):
        original, other = make_state(source, world_size, 0), make_state(target, world_size, 1)
        train_by_hand(original, 2)
        checkpoint = saved(original, rank, world_size)
        load(checkpoint, other, rank, world_size)
        again = saved(other, rank, world_size)
        assert again.arrays.keys() == checkpoint.arrays.keys()
        for id_, array in checkpoint.arrays.items():
            assert torch.equal(again.arrays[id_], array), (source.__name__, target.__name__, id_)
        assert fingerprint({"s": other["scheduler"]}) == fingerprint({"s": original["scheduler"]})
        train_by_hand(other, 1)


def test_states_go_to_other_layouts_bit_for_bit() -> None:
    run_ranks(resharded, 4)


def odd_states(rank: int, world_size: int) -> None:
    def make(seed: int) -> State:
        state = make_state(fsdp, world_size, seed)
        weight, bias = state["model"].up.weight, state["model"].up.bias
        local = weight.to_local()
        state["optimizer"].state[weight] = {"plain": local * 0 + rank, "rows": local.new_full((rank + 1,), rank)}
        state["optimizer"].state[bias] = {"plain": bias.to_local() + 0}
        return state

    original, other = make(0), make(1)
    other["optimizer"].state[other["model"].up.weight]["rows"].zero_()
    checkpoint = saved(original, rank, world_size)
    assert checkpoint.specs[ArrayId("params", "model", "up.weight", "plain")].shape == (10, 6)
    load(checkpoint, other, rank, world_size)
    assert fingerprint(other) == fingerprint(original)
    fresh = make_state(fsdp, world_size, 2)
    load(checkpoint, fresh, rank, world_size)
    made = fresh["optimizer"].state[fresh["model"].up.weight]
    assert torch.equal(made["rows"], torch.full((rank + 1,), float(rank)))
    alone = make_state(single, 1, 3)
    before = fingerprint(alone)
    binding = bind(hold_models(alone, rank=0, world_size=1, declared=None), checkpoint.listing(world_size=1))
    assert [(m.name, m.what) for m in binding.mismatches] == [("/optimizer/state/model/up.weight/rows", "value")]
    with pytest.raises(StateMismatch, match="cannot be resharded"):
        checkpoint.fill(binding)
    assert fingerprint(alone) == before
    original["optimizer"].state[original["model"].up.weight]["rows"] = torch.full((20_000,), float(rank))
    large = saved(original, rank, world_size)
    name = f"@rank{rank}/state/model/up.weight/rows"
    assert large.attributes[ArrayId("extra", "optimizer", name, "")] == {"rank": rank}
    second = make_state(fsdp, world_size, 4)
    load(large, second, rank, world_size)
    assert torch.equal(second["optimizer"].state[second["model"].up.weight]["rows"], torch.full((20_000,), float(rank)))


def test_a_plain_state_on_a_sharded_parameter_lies_as_its_shard_or_is_the_ranks_own() -> None:
    """[UCF-87, UCF-111]"""
    run_ranks(odd_states, 2)


def sharded_values(rank: int, world_size: int) -> None:
    state = make_state(fsdp, world_size, 0)
    shadow = state["model"].up.weight.detach() * 2
    checkpoint = saved({"ema": {"shadow": shadow}, "model": state["model"]}, rank, world_size)
    other = make_state(tp, world_size, 1)
    live = {"ema": {"shadow": other["model"].up.weight.detach() * 0}}
    load(checkpoint, live, rank, world_size)
    assert torch.equal(live["ema"]["shadow"].full_tensor(), shadow.full_tensor())


def test_dtensors_in_containers_are_filled_at_their_own_placement() -> None:
    run_ranks(sharded_values, 2)


def zero_redundancy(rank: int, world_size: int) -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = Net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    with pytest.raises(LayoutUnsupported) as refusal:
        capture({"model": model, "optimizer": optimizer}, rank=rank, world_size=world_size, declared=None)
    return refusal.value.message


def test_an_optimizer_that_spreads_whole_states_over_ranks_is_refused() -> None:
    assert all("ZeroRedundancyOptimizer" in message for message in run_ranks(zero_redundancy, 2))
