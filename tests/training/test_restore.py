"""What `bind` does with values, objects, containers and per-rank state; that differences change nothing."""

from __future__ import annotations

from collections import Counter, OrderedDict
from types import MappingProxyType
from typing import Any

import numpy
import pytest
import torch
from fingerprint import fingerprint
from memory_checkpoint import MemoryCheckpoint, known
from torch import nn

from elastickpt.errors import StateMismatch
from elastickpt.format.arrays import ArrayId
from elastickpt.training.capture import capture
from elastickpt.training.held_trees import PerRank
from elastickpt.training.listing import Binding, unexpected
from elastickpt.training.restore import bind, hold_models
from elastickpt.training.rng import RNG

State = dict[str, Any]


class Stateful:
    """An object whose state is any value; it keeps what it is given."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.loads = 0

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.loads += 1
        self.state = state


def saved(*states: State, step: int | None = None) -> MemoryCheckpoint:
    count = len(states)
    captures = [capture(state, rank=rank, world_size=count, declared=None) for rank, state in enumerate(states)]
    return MemoryCheckpoint(captures, step=step)


def bound(checkpoint: MemoryCheckpoint, state: Any, *, rank: int = 0, world_size: int | None = None) -> Binding:
    world = checkpoint.world_size if world_size is None else world_size
    listing = checkpoint.listing(world_size=world)
    return bind(hold_models(state, rank=rank, world_size=world, declared=None), listing)


def load(checkpoint: MemoryCheckpoint, state: Any, *, rank: int = 0, world_size: int | None = None) -> Binding:
    binding = bound(checkpoint, state, rank=rank, world_size=world_size)
    checkpoint.fill(binding)
    return binding


def refused(checkpoint: MemoryCheckpoint, state: Any, **job: int) -> list[tuple[str, str]]:
    before = fingerprint(state)
    binding = bound(checkpoint, state, **job)
    with pytest.raises(StateMismatch):
        checkpoint.fill(binding)
    assert fingerprint(state) == before
    return sorted((mismatch.name, mismatch.what) for mismatch in binding.mismatches)


# models


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].running_mean.normal_()
    return model


def test_a_model_is_filled_in_place() -> None:
    original, other = {"model": net(0)}, {"model": net(1)}
    pointers = [p.data_ptr() for p in other["model"].parameters()]
    load(saved(original), other)
    assert fingerprint(other) == fingerprint(original)
    assert [p.data_ptr() for p in other["model"].parameters()] == pointers


def test_differences_of_a_model_are_all_found_and_nothing_changes() -> None:
    other = net(1)
    other[0] = nn.Linear(3, 5)
    other[2] = nn.Linear(4, 2).double()
    other.append(nn.Linear(2, 2, bias=False))
    assert refused(saved({"model": net(0)}), {"model": other}) == [
        ("params/model/0.bias/value", "shape"),
        ("params/model/0.weight/value", "shape"),
        ("params/model/2.bias/value", "dtype"),
        ("params/model/2.weight/value", "dtype"),
        ("params/model/3.weight/value", "missing"),
    ]


def test_a_mismatch_names_what_each_side_has() -> None:
    (mismatch,) = bound(saved({"t": torch.zeros(3)}), {"t": torch.zeros(2)}).mismatches
    assert str(mismatch) == "extra/t: shape: expected (2,) (in this process), found (3,) (in the checkpoint)"
    assert mismatch.side == "both"


def test_what_no_rank_has_a_place_for_is_unexpected() -> None:
    original = {"model": net(0), "step": 3, "rng": RNG(), "loader": PerRank(1)}
    listing = saved(original).listing()
    binding = bind(hold_models({"model": net(1)[:1]}, rank=0, world_size=1, declared=None), listing)
    assert binding.mismatches == ()
    names = [mismatch.name for mismatch in unexpected(listing, arrays=known(listing, binding), places=binding.places)]
    assert names[-3:] == ["/step", "/rng", "/loader"]
    assert "params/model/2.weight/value" in names
    assert not any(name.startswith("params/model/0.") for name in names)
    whole = bind(hold_models(original, rank=0, world_size=1, declared=None), listing)
    assert not list(unexpected(listing, arrays=known(listing, whole), places=whole.places))


class Pair(nn.Module):
    def __init__(self, **weights: nn.Parameter) -> None:
        super().__init__()
        for name, weight in weights.items():
            setattr(self, name, weight)


def test_tied_in_the_checkpoint_and_apart_here_are_both_filled() -> None:
    weight = nn.Parameter(torch.randn(3))
    apart = Pair(a=nn.Parameter(torch.zeros(3)), b=nn.Parameter(torch.zeros(3)))
    binding = load(saved({"model": Pair(a=weight, b=weight)}), {"model": apart})
    assert [target.spec.id.name for target in binding.targets] == ["a", "a"]
    assert torch.equal(apart.a, weight)
    assert torch.equal(apart.b, weight)


def test_apart_in_the_checkpoint_and_tied_here_takes_the_first_and_says_so() -> None:
    tied = nn.Parameter(torch.zeros(3))
    original = Pair(a=nn.Parameter(torch.ones(3)), b=nn.Parameter(torch.full((3,), 2.0)))
    checkpoint = saved({"model": original})
    binding = load(checkpoint, {"model": Pair(a=tied, b=tied)})
    assert torch.equal(tied, original.a)
    assert binding.notes == ("params/model/b/value is not read: it is tied to params/model/a/value in this process",)
    assert not list(unexpected(checkpoint.listing(), arrays=known(checkpoint.listing(), binding), places=binding.places))


def test_a_parameter_that_also_stands_elsewhere_in_state_is_read_once() -> None:
    model, other = net(0), net(1)
    binding = load(saved({"model": model, "anchor": [model[0].weight]}), {"model": other, "anchor": [other[0].weight]})
    assert len([target for target in binding.targets if target.spec.id.name == "0.weight"]) == 1
    assert torch.equal(other[0].weight, model[0].weight)
    alone: State = {"anchor": [torch.zeros(4, 3)]}
    load(saved({"model": model, "anchor": [model[0].weight]}), alone)
    assert torch.equal(alone["anchor"][0], model[0].weight)


# objects


def test_an_object_gets_the_tree_of_the_checkpoint_whatever_its_own_is() -> None:
    tree = {"a": [1, (2.5, None)], "t": torch.arange(4), "c": Counter(x=2), 3: b"\x00"}
    original, other = {"o": Stateful(tree)}, {"o": Stateful({"z": 1})}
    load(saved(original), other)
    assert fingerprint(other) == fingerprint(original)
    assert other["o"].loads == 1
    assert other["o"].state["t"] is not tree["t"]


def test_tensors_of_an_object_are_read_into_its_own_where_they_fit() -> None:
    fits, grows = torch.zeros(4), torch.zeros(2)
    other = {"o": Stateful({"fits": fits, "grows": grows})}
    load(saved({"o": Stateful({"fits": torch.ones(4), "grows": torch.ones(5)})}), other)
    assert other["o"].state["fits"] is fits
    assert fits.tolist() == [1] * 4
    assert other["o"].state["grows"].tolist() == [1] * 5
    assert grows.tolist() == [0, 0]


def test_an_object_that_the_checkpoint_lacks_is_missing() -> None:
    other = {"o": Stateful({"t": torch.zeros(2)})}
    assert refused(saved({"x": 1}), other) == [("/o", "missing")]
    assert other["o"].loads == 0


# containers of the user


def test_containers_are_changed_in_place() -> None:
    counters, history, seen = {"step": 1, "inner": {"loss": 2.0}}, [1, 2], {1}
    live: State = {"c": counters, "h": history, "s": seen, "n": Counter(a=1), "step": 0, "pair": (1, [2])}
    inner, pair_list, counter = counters["inner"], live["pair"][1], live["n"]
    target: State = {
        "c": {"step": 9, "inner": {"loss": float("nan")}},
        "h": [3, 4, 5],
        "s": {7, 8},
        "n": Counter(b=4),
        "step": 12,
        "pair": (5, [6]),
    }
    load(saved(target), live)
    assert fingerprint(live) == fingerprint(target)
    assert live["c"] is counters
    assert counters["inner"] is inner
    assert live["h"] is history
    assert live["s"] is seen
    assert live["n"] is counter
    assert live["pair"][1] is pair_list


def test_tensors_in_containers_are_filled_in_place() -> None:
    first, second = torch.zeros(2), torch.zeros(3, dtype=torch.int32)
    live = {"e": {"a": [first, (second, 1)]}}
    load(saved({"e": {"a": [torch.ones(2), (torch.full((3,), 5, dtype=torch.int32), 2)]}}), live)
    assert live["e"]["a"][0] is first
    assert live["e"]["a"][1][0] is second
    assert (first.tolist(), second.tolist(), live["e"]["a"][1][1]) == ([1, 1], [5, 5, 5], 2)


def test_numpy_arrays_are_filled_in_place_where_they_fit() -> None:
    array = numpy.zeros(3)
    live = {"v": {"array": array, "scalar": numpy.float32(0), "other": numpy.zeros(1)}}
    target = {"v": {"array": numpy.arange(3.0), "scalar": numpy.float32(2), "other": numpy.ones(2, dtype=numpy.int8)}}
    load(saved(target), live)
    assert live["v"]["array"] is array
    assert fingerprint(live) == fingerprint(target)


@pytest.mark.parametrize(
    ("live", "found"),
    [
        (0, 2.5),
        (None, {"a": [1]}),
        (1.0, None),
        ("x", (1, 2)),
        ([], [1, {"a": 2}]),
        ({}, {"a": 1, 2: "b"}),
        ([1, 2, 3], []),
        ((1,), (2, 3)),
        (frozenset({1}), frozenset({2})),
        (True, 1),
        (OrderedDict(a=1), OrderedDict(a=2)),
        ([{"a": 1}], [{"a": 2}, {"b": 3}]),
    ],
)
def test_a_value_becomes_that_of_the_checkpoint(live: object, found: object) -> None:
    state = {"v": live, "inside": [live]}
    load(saved({"v": found, "inside": [found]}), state)
    assert fingerprint(state) == fingerprint({"v": found, "inside": [found]})


@pytest.mark.parametrize(
    ("live", "found", "expected"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "c": 3}, [("/v/b", "missing"), ("/v/c", "unexpected")]),
        ({"a": {"x": 1}}, {"a": 5}, [("/v/a", "value")]),
        ({"a": 1}, [1], [("/v", "value")]),
        ([torch.zeros(2)], [torch.zeros(2), 1], [("/v", "value")]),
        ([torch.zeros(2)], [5], [("/v/0", "value")]),
        ([5], [torch.zeros(2)], [("/v/0", "value")]),
        ([torch.zeros(2)], [torch.zeros(3)], [("extra/v/0", "shape")]),
        ([torch.zeros(2)], [torch.zeros(2).int()], [("extra/v/0", "dtype")]),
        (OrderedDict(a=1), {"a": 1}, [("/v", "value")]),
        ([object], [5], [("/v/0", "value")]),
    ],
)
def test_another_structure_is_refused_and_changes_nothing(live: Any, found: Any, expected: list[tuple[str, str]]) -> None:
    live_before = repr(live)
    binding = bound(saved({"v": found, "step": 5}), {"v": live, "step": 1})
    assert sorted((m.name, m.what) for m in binding.mismatches) == expected
    assert repr(live) == live_before


def test_a_state_that_is_no_mutable_mapping_can_hold_containers_and_equal_values() -> None:
    checkpoint = saved({"c": {"step": 5}, "step": 3})
    counters = {"step": 0}
    load(checkpoint, MappingProxyType({"c": counters, "step": 3}))
    assert counters == {"step": 5}
    binding = bound(checkpoint, MappingProxyType({"c": counters, "step": 4}))
    assert [(m.name, m.what) for m in binding.mismatches] == [("/step", "value")]


def test_a_value_that_the_checkpoint_lacks_is_missing() -> None:
    assert refused(saved({"a": 1}), {"a": 2, "b": 3}) == [("/b", "missing")]


# per rank


def test_each_rank_gets_its_own_on_the_same_layout() -> None:
    checkpoint = saved(*({"w": PerRank({"id": rank}), "o": PerRank(Stateful([rank]))} for rank in range(3)))
    live = {"w": PerRank({"id": 9}), "o": PerRank(Stateful([9]))}
    inner = live["w"].value
    load(checkpoint, live, rank=2)
    assert live["w"].value == {"id": 2}
    assert live["w"].value is inner
    assert live["o"].value.state == [2]
    assert set(checkpoint.reads) == {2}


def test_a_plain_value_per_rank_is_replaced_inside() -> None:
    live = {"w": PerRank(9), "t": PerRank(torch.zeros(2))}
    load(saved({"w": PerRank(4), "t": PerRank(torch.ones(2))}), live)
    assert live["w"].value == 4
    assert live["t"].value.tolist() == [1, 1]


def test_per_rank_state_without_reshard_is_refused_on_another_layout() -> None:
    checkpoint = saved(*({"o": PerRank(Stateful(rank))} for rank in range(2)))
    live = {"o": PerRank(Stateful(7))}
    assert refused(checkpoint, live, world_size=1) == [("/o", "value")]
    (mismatch,) = bound(checkpoint, live, world_size=1).mismatches
    assert "Stateful with a method reshard(states, rank, world_size)" in mismatch.expected
    assert checkpoint.reads == []


class Sampler(Stateful):
    """Positions in one list that all ranks share out."""

    def reshard(self, states: list[Any], rank: int, world_size: int) -> Any:
        everything = [one for state in states for one in state["left"]]
        return {"left": everything[rank::world_size], "mask": states[0]["mask"]}


def test_per_rank_state_is_cut_anew_by_its_own_method() -> None:
    checkpoint = saved(*({"s": PerRank(Sampler({"left": [k, k + 10], "mask": torch.ones(2)}))} for k in range(3)))
    found = []
    for rank in range(2):
        live = {"s": PerRank(Sampler({"left": [], "mask": None}))}
        binding = bound(checkpoint, live, rank=rank, world_size=2)
        assert live["s"].value.state == {"left": [], "mask": None}
        checkpoint.fill(binding)
        found.append(live["s"].value.state["left"])
        assert torch.equal(live["s"].value.state["mask"], torch.ones(2))
    assert found == [[0, 1, 2], [10, 11, 12]]


def test_per_rank_state_that_the_checkpoint_lacks_is_missing() -> None:
    assert refused(saved({"a": 1}), {"a": 1, "o": PerRank(Stateful(1))}) == [("/o", "missing")]
    assert refused(saved({"a": 1}), {"a": 1, "o": PerRank(Sampler({}))}, world_size=2) == [("/o", "missing")]


class Extra(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


def test_extra_state_is_restored_on_the_same_layout() -> None:
    checkpoint = saved({"model": nn.Sequential(Extra(1))}, {"model": nn.Sequential(Extra({"scale": torch.ones(2)}))})
    live = {"model": nn.Sequential(Extra(None))}
    load(checkpoint, live, rank=1)
    assert live["model"][0].value["scale"].tolist() == [1, 1]


def test_extra_state_that_was_equal_on_all_ranks_goes_to_another_layout() -> None:
    checkpoint = saved({"model": nn.Sequential(Extra((1, 2)))}, {"model": nn.Sequential(Extra((1, 2)))})
    live = {"model": nn.Sequential(Extra(None))}
    load(checkpoint, live, world_size=1)
    assert live["model"][0].value == (1, 2)


def test_extra_state_that_differed_is_refused_on_another_layout() -> None:
    checkpoint = saved({"model": nn.Sequential(Extra(1))}, {"model": nn.Sequential(Extra(2))})
    assert refused(checkpoint, {"model": nn.Sequential(Extra(None))}, world_size=1) == [("/model/0", "value")]
    assert refused(checkpoint, {"model": nn.Sequential(nn.Identity(), Extra(None))}) == [("/model/1", "missing")]


# everything at once


def everything(seed: int) -> State:
    model = net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    return {
        "rng": RNG(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "optimizer": optimizer,
        "loader": PerRank(Stateful({"position": seed})),
        "counters": {"step": seed, "tokens": [seed]},
        "ema": {"shadow": torch.randn(3)},
        "model": model,
        "step": seed,
    }


def stepped(state: State) -> None:
    torch.rand(3)
    state["model"](torch.randn(5, 3)).square().mean().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    state["scheduler"].step()


def test_a_whole_training_state_is_restored_and_goes_on_alike() -> None:
    original, other = everything(0), everything(1)
    stepped(original)
    checkpoint = saved(original)
    after = fingerprint(original)
    stepped(original)
    final = fingerprint(original)
    stepped(other)
    load(checkpoint, other)
    assert fingerprint(other) == after
    stepped(other)
    assert fingerprint(other) == final


def test_one_mismatch_anywhere_keeps_everything_as_it_was() -> None:
    original = everything(0)
    stepped(original)
    checkpoint = saved(original)
    other = everything(1)
    other["ema"]["shadow"] = torch.randn(4)
    assert refused(checkpoint, other) == [("extra/ema/shadow", "shape")]


def test_binding_again_is_possible_after_a_refusal() -> None:
    original, other = everything(0), everything(1)
    checkpoint = saved(original)
    right, other["ema"]["shadow"] = other["ema"]["shadow"], torch.randn(4)
    refused(checkpoint, other)
    other["ema"]["shadow"] = right
    load(checkpoint, other)
    assert fingerprint(other) == {**fingerprint(original), "rng": fingerprint(other)["rng"]}


def test_targets_carry_the_ids_of_the_checkpoint() -> None:
    checkpoint = saved(everything(0))
    binding = bound(checkpoint, everything(1))
    assert {target.spec.id for target in binding.targets} <= binding.arrays
    assert ArrayId("extra", "ema", "shadow", "") in known(checkpoint.listing(), binding)
