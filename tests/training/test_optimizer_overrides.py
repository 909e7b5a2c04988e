"""State of optimizers that exists through an override, a hook or an optimizer inside only: it comes back bit for bit.

Every optimizer here is trained, saved, loaded into a fresh one and trained on, beside the one that was never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import fingerprint
from memory_checkpoint import MemoryCheckpoint, known
from own_optimizers import (
    Aliasing,
    Apart,
    Averaging,
    AveragingByPair,
    AveragingByParameter,
    AveragingInState,
    Delegating,
    Flat,
    Hidden,
    Nesting,
    Noting,
    Outer,
    Packed,
    Slow,
    Two,
)
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.optim import Optimizer

import elastickpt as ek
from elastickpt.errors import EntryFailed, StructureConflict, ValueNotCarried
from elastickpt.format.arrays import ArrayId
from elastickpt.training.capture import capture
from elastickpt.training.listing import unexpected
from elastickpt.training.restore import bind, hold_models

State = dict[str, Any]
Make = Callable[[list[nn.Parameter]], Optimizer]


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def make_state(make: Make, seed: int, dtype: torch.dtype = torch.float32) -> State:
    model = network(seed, dtype)
    return {"model": model, "optimizer": make(list(model.parameters()))}


def train(state: State, steps: int, *, seed: int = 7) -> list[torch.Tensor]:
    """Steps on one fixed stream of data; gives the parameters after them."""
    source = torch.Generator().manual_seed(seed)
    model, optimizer = state["model"], state["optimizer"]
    for _ in range(steps):
        x = torch.randn(5, 4, generator=source).to(next(model.parameters()).dtype)
        for parameter in model.parameters():
            parameter.grad = None
        model(x).square().mean().backward()
        for one in optimizer if isinstance(optimizer, list) else [optimizer]:
            one.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def saved(state: State) -> MemoryCheckpoint:
    return MemoryCheckpoint([capture(state, rank=0, world_size=1, declared=None)])


def load(checkpoint: MemoryCheckpoint, state: State) -> tuple[str, ...]:
    binding = bind(hold_models(state, rank=0, world_size=1, declared=None), checkpoint.listing())
    found = list(unexpected(checkpoint.listing(), arrays=known(checkpoint.listing(), binding), places=binding.places))
    assert [*binding.mismatches, *found] == []
    checkpoint.fill(binding)
    return binding.notes


def states_named(checkpoint: MemoryCheckpoint) -> set[str]:
    return {id_.state for id_ in checkpoint.arrays if id_.section == "params"}


def averager(params: list[nn.Parameter]) -> Optimizer:
    return PostLocalSGDOptimizer(
        torch.optim.SGD(params, lr=0.1, momentum=0.9), PeriodicModelAverager(period=4, warmup_steps=100)
    )


OPTIMIZERS: dict[str, Make] = {
    "outer": Outer,
    "hidden": Hidden,
    "two": Two,
    "apart": Apart,
    "delegating": Delegating,
    "aliasing": Aliasing,
    "slow": Slow,
    "averaging": Averaging,
    "averaging-by-pair": AveragingByPair,
    "averaging-by-parameter": AveragingByParameter,
    "averaging-in-state": AveragingInState,
    "packed": Packed,
    "nesting": Nesting,
    "flat": Flat,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("before", [0, 2], ids=["fresh", "trained"])
def test_it_goes_on_bit_for_bit(make: Make, before: int) -> None:
    original, other = make_state(make, 0), make_state(make, 1)
    train(original, 4)
    train(other, before, seed=9)
    checkpoint = saved(original)
    load(checkpoint, other)
    expected = train(original, 4, seed=11)
    assert all(map(torch.equal, train(other, 4, seed=11), expected))
    assert contents(saved(other)) == contents(saved(original))


def contents(checkpoint: MemoryCheckpoint) -> object:
    """All that a checkpoint says of an optimizer, to be compared."""
    fields = {(field.kind, field.key): [field.values[k] for k in field.which] for t in checkpoint.tables for field in t.fields}
    return fingerprint({"fields": fields, "values": dict(checkpoint.values)}), sorted(map(str, checkpoint.arrays))


@pytest.mark.parametrize(
    ("make", "states"),
    [
        (Outer, {"exp_avg", "exp_avg_sq"}),
        (Hidden, {"exp_avg", "exp_avg_sq"}),
        (Two, {"momentum_buffer", "exp_avg", "exp_avg_sq"}),
        (Apart, {"momentum_buffer", "exp_avg", "exp_avg_sq"}),
        (Delegating, {"exp_avg", "exp_avg_sq"}),
        (Slow, {"slow_param", "optimizer.exp_avg", "optimizer.exp_avg_sq"}),
        (Averaging, {"momentum_buffer", "averages"}),
        (AveragingByPair, {"momentum_buffer", "averages"}),
        (AveragingByParameter, {"momentum_buffer", "averages"}),
        (AveragingInState, {"momentum_buffer", "average"}),
        (Packed, {"codes"}),
        (Nesting, {"exp_avg", "exp_avg_sq"}),
    ],
)
def test_what_goes_by_parameters_is_a_state_of_them(make: Make, states: set[str]) -> None:
    """[UCF-150, UCF-151]"""
    state = make_state(make, 0)
    train(state, 2)
    state["o"] = state.pop("optimizer")
    assert states_named(saved(state)) == {"value", *states}


def test_entries_of_every_form_come_back() -> None:
    """[UCF-152]"""
    original, other = make_state(Noting, 0), make_state(Noting, 1)
    scale = torch.randn(3)
    original["optimizer"].notes = {"count": 3, ("a", 1): {"b": [torch.ones(2), None]}, 5: 1.5}
    original["optimizer"].scale = scale
    checkpoint = saved(original)
    assert ArrayId("extra", "optimizer", "scale", "") in checkpoint.arrays
    assert checkpoint.values["/optimizer/param_groups/0/seen"] == 3
    load(checkpoint, other)
    notes = other["optimizer"].notes
    assert set(notes) == {"count", ("a", 1), 5}
    assert (notes["count"], notes[5], notes["a", 1]["b"][1]) == (3, 1.5, None)
    assert torch.equal(notes["a", 1]["b"][0], torch.ones(2))
    assert torch.equal(other["optimizer"].scale, scale)
    assert other["optimizer"].seen == 3


def test_entries_that_were_not_there_when_saving_are_gone_after_a_rollback() -> None:
    """[UCF-152]"""
    state = make_state(Averaging, 0)
    checkpoint = saved(state)
    before = train(make_state(Averaging, 0), 3)
    train(state, 2)
    load(checkpoint, state)
    assert state["optimizer"].averages == {}
    assert state["optimizer"].count == 0
    assert all(map(torch.equal, train(state, 3), before))


def test_entries_that_only_this_process_has_are_missing() -> None:
    """In a checkpoint of an optimizer whose state dict was not looked at, as those of older releases."""
    original, other = make_state(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 0), make_state(Averaging, 1)
    train(original, 1)
    train(other, 1)
    binding = bind(hold_models(other, rank=0, world_size=1, declared=None), saved(original).listing())
    assert {(one.name, one.what) for one in binding.mismatches} == {
        ("/optimizer/count", "missing"),
        *((f"/optimizer/state/model/{name}/averages", "missing") for name, _ in other["model"].named_parameters()),
    }


def test_entries_that_nobody_takes_are_unexpected() -> None:
    original, other = make_state(Noting, 0), make_state(lambda p: torch.optim.SGD(p, lr=0.1), 1)
    checkpoint = saved(original)
    binding = bind(hold_models(other, rank=0, world_size=1, declared=None), checkpoint.listing())
    found = {
        one.name for one in unexpected(checkpoint.listing(), arrays=known(checkpoint.listing(), binding), places=binding.places)
    }
    assert found == {
        "extra/optimizer/scale",
        "/optimizer/scale",
        "/optimizer/notes",
        "/optimizer/param_groups/0/seen",
        "/optimizer/@entries",
    }


class Contradicting(torch.optim.SGD):
    """Calls by the name of a state what is something else."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.others = [torch.full_like(p, 5.0) for p in self.param_groups[0]["params"]]

    def state_dict(self) -> Any:
        found = super().state_dict()
        found["state"] = {k: {"momentum_buffer": self.others[k]} for k in found["state"]}
        return found


def test_other_contents_under_the_name_of_a_state_are_refused() -> None:
    state = make_state(Contradicting, 0)
    train(state, 1)
    with pytest.raises(ValueNotCarried, match=r"state_dict of Contradicting has 'momentum_buffer' of model/0\.weight"):
        saved(state)


class Raising(torch.optim.SGD):
    def state_dict(self) -> Any:
        raise RuntimeError("not now")


def test_a_state_dict_that_raises_is_named() -> None:
    with pytest.raises(EntryFailed, match=r"entry 'optimizer' \(Raising\): taking its state raised RuntimeError: not now"):
        saved(make_state(lambda p: Raising(p, lr=0.1), 0))


class Uninitialised(Optimizer):
    def __init__(self, params: Iterable[Any]) -> None:
        self.params = list(params)


def test_an_optimizer_without_groups_and_state_dict_is_named() -> None:
    with pytest.raises(ValueNotCarried, match="optimizer 'optimizer': a Uninitialised without `param_groups`"):
        saved(make_state(Uninitialised, 0))


class Masters(Uninitialised):
    """Trains copies of the parameters in a higher precision; torch's own __init__ was never called."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        self.masters = [nn.Parameter(p.detach().float()) for p in self.params]
        self.optimizer = torch.optim.Adam(self.masters, lr=0.01)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p, master in zip(self.params, self.masters, strict=True):
            master.grad = p.grad.float()
        self.optimizer.step()
        for p, master in zip(self.params, self.masters, strict=True):
            p.data.copy_(master.data)

    def state_dict(self) -> Any:
        return {**self.optimizer.state_dict(), "masters": [p.detach().clone() for p in self.masters]}

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)
        with torch.no_grad():
            for p, master in zip(self.masters, state_dict["masters"], strict=True):
                p.copy_(master)


def test_masters_of_parameters_are_carried_as_the_state_dict_has_them() -> None:
    original, other = (make_state(Masters, seed, torch.bfloat16) for seed in (0, 1))
    train(original, 3)
    load(saved(original), other)
    assert all(map(torch.equal, train(other, 3), train(original, 3)))
    assert all(map(torch.equal, other["optimizer"].masters, original["optimizer"].masters))


def test_states_of_another_precision_than_their_parameter_keep_their_bits() -> None:
    """torch's own `load_state_dict`, which the override calls, casts them to the parameter's."""

    class Precise(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros(p.shape, dtype=torch.float64))
                momentum.mul_(0.9).add_(p.grad)
                p.data.sub_(0.1 * momentum)

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)

    original, other = make_state(lambda p: Precise(p, lr=0.1), 0), make_state(lambda p: Precise(p, lr=0.1), 1)
    train(original, 3)
    load(saved(original), other)
    assert fingerprint(other) == fingerprint(original)


def test_the_averager_of_torchs_own_post_local_sgd_is_carried() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        original, other = make_state(averager, 0), make_state(averager, 1)
        train(original, 5)
        load(saved(original), other)
        assert other["optimizer"].averager.step == 5
        assert all(map(torch.equal, train(other, 3), train(original, 3)))
    finally:
        torch.distributed.destroy_process_group()


class Gathering(torch.optim.SGD):
    def state_dict(self) -> Any:
        torch.distributed.all_reduce(torch.ones(1))
        return super().state_dict()


def test_a_state_dict_that_communicates_is_refused_before_it_does() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueNotCarried, match=r"state_dict of optimizer 'optimizer' \(Gathering\) starts a collective"):
            saved(make_state(lambda p: Gathering(p, lr=0.1), 0))
    finally:
        torch.distributed.destroy_process_group()


def adam(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def test_hooks_of_the_state_dict_are_called_and_what_they_add_comes_back() -> None:
    def make(seed: int) -> tuple[State, dict[str, Any]]:
        state, own = make_state(adam, seed), {"count": 0, "filled": False, "noise": torch.zeros(3)}
        optimizer = state["optimizer"]

        def add(one: Optimizer, found: dict[str, Any]) -> dict[str, Any]:
            return {**found, "count": own["count"], "noise": own["noise"]}

        def take(one: Optimizer, found: dict[str, Any]) -> None:
            own["count"], own["noise"] = found.pop("count"), found.pop("noise")

        optimizer.register_state_dict_pre_hook(lambda one: own.__setitem__("filled", True))
        optimizer.register_state_dict_post_hook(add)
        optimizer.register_load_state_dict_pre_hook(take)
        optimizer.register_load_state_dict_post_hook(lambda one: own.__setitem__("loaded", len(one.state)))
        return state, own

    (original, mine), (other, theirs) = make(0), make(1)
    train(original, 2)
    mine.update(count=7, noise=torch.randn(3))
    checkpoint = saved(original)
    assert mine["filled"]
    load(checkpoint, other)
    assert theirs["count"] == 7
    assert torch.equal(theirs["noise"], mine["noise"])
    assert theirs["loaded"] == 4
    assert all(map(torch.equal, train(other, 3), train(original, 3)))


def test_what_hooks_change_on_loading_stays_changed() -> None:
    original, other = make_state(adam, 0), make_state(adam, 1)
    train(original, 2)
    optimizer, first = other["optimizer"], next(other["model"].parameters())

    def before(one: Optimizer, found: dict[str, Any]) -> None:
        found["state"][0] = {**found["state"][0], "exp_avg": torch.full_like(first, 3.0)}

    def after(one: Optimizer) -> None:
        one.param_groups[0]["lr"] = 0.25
        one.state[first]["exp_avg_sq"].fill_(9.0)

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    load(saved(original), other)
    assert torch.equal(optimizer.state[first]["exp_avg"], torch.full_like(first, 3.0))
    assert torch.equal(optimizer.state[first]["exp_avg_sq"], torch.full_like(first, 9.0))
    assert optimizer.param_groups[0]["lr"] == 0.25
    last, expected = list(other["model"].parameters())[-1], list(original["model"].parameters())[-1]
    assert torch.equal(optimizer.state[last]["exp_avg"], original["optimizer"].state[expected]["exp_avg"])


def test_a_loading_of_its_own_is_called_and_what_it_derives_is_fresh() -> None:
    class Deriving(torch.optim.Adam):
        total = 0.0

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            self.total = sum(float(states["exp_avg"].sum()) for states in self.state.values())

    original, other = make_state(Deriving, 0), make_state(Deriving, 1)
    train(original, 2)
    load(saved(original), other)
    assert other["optimizer"].total == sum(float(one["exp_avg"].sum()) for one in original["optimizer"].state.values()) != 0


def test_dicts_and_lists_of_an_optimizer_stay_the_objects_that_others_hold() -> None:
    original, other = make_state(Aliasing, 0), make_state(Aliasing, 1)
    scheduler = torch.optim.lr_scheduler.StepLR(other["optimizer"].optimizer, 1)
    wrapper, inner = other["optimizer"], other["optimizer"].optimizer
    groups, group, states = wrapper.param_groups, wrapper.param_groups[0], wrapper.state
    train(original, 2)
    original["optimizer"].param_groups[0]["lr"] = 0.5
    original["optimizer"].param_groups[0]["initial_lr"] = 0.5
    load(saved(original), other)
    assert wrapper.param_groups is inner.param_groups is groups
    assert groups[0] is group
    assert wrapper.state is inner.state is states
    assert scheduler.optimizer.param_groups[0]["lr"] == 0.5


def test_loading_that_raises_is_named_and_says_what_had_changed() -> None:
    class Unloadable(torch.optim.Adam):
        def load_state_dict(self, state_dict: Any) -> None:
            raise RuntimeError("never")

    original, other = make_state(Unloadable, 0), make_state(Unloadable, 1)
    with pytest.raises(
        EntryFailed, match=r"entry 'optimizer' \(Unloadable\): loading its state raised RuntimeError: never; changed"
    ):
        load(saved(original), other)


def several(seed: int, kind: Callable[[list[Optimizer]], Any]) -> State:
    model = network(seed)
    one = torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], lr=0.1, momentum=0.9)
    other = torch.optim.AdamW([p for p in model.parameters() if p.ndim == 1], lr=0.01)
    return {"model": model, "optimizer": kind([one, other]), "each": [one, other]}


KINDS: dict[str, Callable[[list[Optimizer]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda each: dict(zip(("matrices", "rest"), each, strict=True)),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_several_optimizers_under_one_key_are_taken(kind: Callable[[list[Optimizer]], Any]) -> None:
    original, other = several(0, kind), several(1, kind)
    each, others = original.pop("each"), other.pop("each")
    for state, optimizers in ((original, each), (other, others)):
        state["scheduler"] = kind([torch.optim.lr_scheduler.StepLR(one, 1, gamma=0.5) for one in optimizers])  # type: ignore[arg-type]
    for optimizer in each:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        optimizer.step()
    schedulers = original["scheduler"].values() if isinstance(original["scheduler"], dict) else original["scheduler"]
    for scheduler in schedulers:
        scheduler.step()
    checkpoint = saved(original)
    assert states_named(checkpoint) == {"value", "momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert [(item.name, item.kind, item.type) for item in checkpoint.items][1:] == [
        ("optimizer", "optimizer", "2 x AdamW, SGD"),
        ("scheduler", "stateful", "2 x StepLR"),
    ]
    load(checkpoint, other)
    assert fingerprint(dict(enumerate(others))) == fingerprint(dict(enumerate(each)))
    assert fingerprint({"m": other["model"]}) == fingerprint({"m": original["model"]})
    again = other["scheduler"].values() if isinstance(other["scheduler"], dict) else other["scheduler"]
    assert [one.state_dict() for one in again] == [one.state_dict() for one in schedulers]


def test_an_optimizer_in_two_lists_is_refused() -> None:
    state = several(0, list)
    first, _ = state.pop("each")
    with pytest.raises(StructureConflict, match="one optimizer under two keys, 'optimizer' and 'again'"):
        saved({**state, "again": [first]})


@pytest.mark.parametrize(
    ("make", "requires"), [(Outer, ("optimizer-parts",)), (Averaging, ("optimizer-parts",)), (Delegating, ()), (adam, ())]
)
def test_what_a_reader_must_know_is_said(make: Make, requires: tuple[str, ...], tmp_path: Path) -> None:
    """[UCF-100]"""
    state = make_state(make, 0)
    train(state, 1)
    ek.save(state, tmp_path / "c")
    assert ek.open(tmp_path / "c").manifest.requires == requires
    other = make_state(make, 1)
    ek.load(other, tmp_path / "c")
    assert all(map(torch.equal, train(other, 2), train(state, 2)))


def test_two_optimizers_of_a_list_on_the_same_parameters_keep_their_states_apart() -> None:
    def make(seed: int) -> State:
        model = network(seed)
        return {"model": model, "optimizer": [adam(list(model.parameters())), torch.optim.Adam(model.parameters(), lr=0.1)]}

    original, other = make(0), make(1)
    train(original, 2)
    checkpoint = saved(original)
    assert states_named(checkpoint) == {"value", "exp_avg", "exp_avg_sq", "1.exp_avg", "1.exp_avg_sq"}
    load(checkpoint, other)
    assert all(map(torch.equal, train(other, 2), train(original, 2)))
    assert [one.param_groups[0]["lr"] for one in other["optimizer"]] == [0.01, 0.1]


def test_a_list_of_other_objects_is_taken_too() -> None:
    class Counting:
        def __init__(self, count: int) -> None:
            self.count = count

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            self.count = state_dict["count"]

    original, other = {"loaders": [Counting(3), Counting(5)]}, {"loaders": [Counting(0), Counting(0)]}
    load(saved(original), other)
    assert [one.count for one in other["loaders"]] == [3, 5]


def test_a_scheduler_of_an_optimizer_inside_follows_its_groups() -> None:
    def make(seed: int, reverse: bool) -> State:
        model = network(seed)
        parts = [model[0], model[2]][:: -1 if reverse else 1]
        lrs = (0.1, 0.2) if not reverse else (7.0, 8.0)
        optimizer = Outer([{"params": list(part.parameters()), "lr": lr} for part, lr in zip(parts, lrs, strict=True)])
        return {"model": model, "optimizer": optimizer, "s": torch.optim.lr_scheduler.StepLR(optimizer.inner, 1)}

    original, other = make(0, False), make(1, True)
    train(original, 2)
    load(saved(original), other)
    assert [group["lr"] for group in other["optimizer"].inner.param_groups] == [0.2, 0.1]
    assert other["s"].base_lrs == [0.2, 0.1]


def two_ranks(make: Make, counts: tuple[int, int]) -> tuple[MemoryCheckpoint, list[State]]:
    """One model, replicated, with `Noting` optimizers that have noted something else on each rank."""
    states = [make_state(make, 0) for _ in counts]
    for state, count in zip(states, counts, strict=True):
        state["optimizer"].notes = {"count": count}
    return MemoryCheckpoint([capture(one, rank=k, world_size=2, declared=None) for k, one in enumerate(states)]), states


def test_entries_that_differ_between_ranks_are_each_ranks_own() -> None:
    """[UCF-152, UCF-141]"""
    checkpoint, _ = two_ranks(Noting, (3, 5))
    for rank, count in enumerate((3, 5)):
        other = make_state(Noting, 1)
        checkpoint.fill(bind(hold_models(other, rank=rank, world_size=2, declared=None), checkpoint.listing()))
        assert other["optimizer"].notes == {"count": count}
    other = make_state(Noting, 1)
    binding = bind(hold_models(other, rank=0, world_size=1, declared=None), checkpoint.listing(world_size=1))
    assert {(one.name, one.what) for one in binding.mismatches} == {
        ("/optimizer/notes", "value"),
        ("/optimizer/param_groups/0/seen", "value"),
    }


def test_entries_that_are_alike_on_all_ranks_go_to_another_layout() -> None:
    checkpoint, _ = two_ranks(Noting, (3, 3))
    other = make_state(Noting, 1)
    listing = checkpoint.listing(world_size=1)
    binding = bind(hold_models(other, rank=0, world_size=1, declared=None), listing)
    assert list(unexpected(listing, arrays=known(listing, binding), places=binding.places)) == []
    checkpoint.fill(binding)
    assert other["optimizer"].notes == {"count": 3}
