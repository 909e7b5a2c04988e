"""What is bound in columns is bound as it would be one by one: the same targets, differences, notes, places and contents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fingerprint import fingerprint
from memory_checkpoint import MemoryCheckpoint, known
from torch import nn

from elastickpt.format.array_columns import ArrayColumns
from elastickpt.training.capture import capture
from elastickpt.training.listing import Binding, Listing
from elastickpt.training.restore import bind, hold_models

State = dict[str, Any]
Change = Callable[[State], None]


def make(seed: int) -> State:
    """A model with buffers, and an optimizer that has stepped twice."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1), foreach=False)
    for _ in range(2):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "ema": {"a": torch.randn(3), "b": torch.randn(2, 2)}}


def first(state: State) -> dict[str, Any]:
    """The states of the first parameter."""
    optimizer = state["optimizer"]
    found: dict[str, Any] = optimizer.state[optimizer.param_groups[0]["params"][0]]
    return found


def nothing(state: State) -> None:
    """As it is."""


def another_shape(state: State) -> None:
    first(state)["exp_avg"] = torch.zeros(2, 2)


def another_type(state: State) -> None:
    first(state)["exp_avg"] = first(state)["exp_avg"].bfloat16()


def another_number_type(state: State) -> None:
    first(state)["step"] = first(state)["step"].double()


def a_plain_number(state: State) -> None:
    first(state)["step"] = 7


def one_more(state: State) -> None:
    first(state)["max_exp_avg_sq"] = torch.ones(3, 4)


def one_less(state: State) -> None:
    del first(state)["exp_avg"]


def no_states(state: State) -> None:
    state["optimizer"].state.clear()


def none_of_one(state: State) -> None:
    first(state).clear()


def other_strides(state: State) -> None:
    first(state)["exp_avg"] = torch.randn(4, 3).t()


def other_strides_of_a_parameter(state: State) -> None:
    state["model"][0].weight.data = torch.randn(4, 3).t()


def tied(state: State) -> None:
    state["ema"]["a"] = state["model"][0].bias


def a_second_optimizer(state: State) -> None:
    other = torch.optim.SGD([state["model"][0].weight], lr=0.1, momentum=0.9)
    state["model"](torch.randn(5, 4)).sum().backward()
    other.step()
    state["second"] = other


def several_in_one(state: State) -> None:
    a_second_optimizer(state)
    state["optimizer"] = [state["optimizer"], state.pop("second")]


def byte_states(state: State) -> None:
    first(state)["exp_avg"] = torch.zeros(3, 4, dtype=torch.uint8)


def of_no_type(state: State) -> None:
    first(state)["exp_avg"] = torch.zeros(3, 4, dtype=torch.complex32)


CHANGES = [
    nothing,
    another_shape,
    another_type,
    another_number_type,
    a_plain_number,
    one_more,
    one_less,
    no_states,
    none_of_one,
    other_strides,
    other_strides_of_a_parameter,
    tied,
    a_second_optimizer,
    several_in_one,
    byte_states,
    of_no_type,
]


def said(listing: Listing, binding: Binding) -> tuple[object, ...]:
    """All of a Binding but in which form its targets stand. Memory that was made for it has no address of its own."""
    targets = [(one.spec.id, one.box, one.tensor.stride(), one.held_alone) for one in binding.targets]
    for many in binding.columns:
        rows = zip(many.places.tolist(), many.box.tolist(), many.tensors, strict=True)
        targets += [(listing.columns.id(place), many.boxes[box], one.stride(), many.held_alone) for place, box, one in rows]
    ties = sorted((str(held.spec.id), str(other)) for held, other in binding.ties)
    return sorted(targets, key=str), binding.mismatches, binding.notes, known(listing, binding), binding.places, ties


@pytest.mark.parametrize("live_is", CHANGES)
@pytest.mark.parametrize("saved_is", CHANGES)
def test_columns_bind_what_is_bound_one_by_one(saved_is: Change, live_is: Change) -> None:
    original, one, other = make(0), make(1), make(1)
    saved_is(original)
    live_is(one)
    live_is(other)
    checkpoint = MemoryCheckpoint([capture(original, rank=0, world_size=1, declared=None)])
    listing = checkpoint.listing()
    alone = replace(listing, columns=ArrayColumns.of(()))
    columns, singly = (
        bind(hold_models(state, rank=0, world_size=1, declared=None), said_by)
        for state, said_by in ((one, listing), (other, alone))
    )
    assert said(listing, columns) == said(listing, singly)
    assert not singly.columns
    if not columns.mismatches:
        checkpoint.fill(columns)
        checkpoint.fill(singly)
        assert fingerprint(one) == fingerprint(other)


def test_a_model_and_its_optimizer_are_bound_in_columns() -> None:
    original, live = make(0), make(1)
    checkpoint = MemoryCheckpoint([capture(original, rank=0, world_size=1, declared=None)])
    binding = bind(hold_models(live, rank=0, world_size=1, declared=None), checkpoint.listing())
    assert not binding.targets
    assert sum(len(many.places) for many in binding.columns) == len(checkpoint.specs)
    weight = live["model"][0].weight
    before = weight._version
    checkpoint.fill(binding)
    assert weight._version > before
    assert fingerprint(live) == fingerprint(original)
