"""What a capture and a load do for each parameter does not grow with their number."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_checkpoint import MemoryCheckpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from elastickpt.training.capture import capture
from elastickpt.training.dtensors import JobView
from elastickpt.training.modules import hold_module
from elastickpt.training.parameters import Identities
from elastickpt.training.restore import bind, hold_models

FEW, MANY = 50, 400  # parameters


def state_of(parameters: int, *, groups: int = 1) -> dict[str, Any]:
    """A model and an optimizer that has stepped."""
    model = nn.ParameterDict({f"p{k}": nn.Parameter(torch.full((2,), float(k))) for k in range(parameters)})
    every = list(model.values())
    optimizer = torch.optim.AdamW([{"params": every[k::groups], "lr": 0.1 + k} for k in range(groups)], foreach=False)
    torch.stack([*model.values()]).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def saved(state: dict[str, Any]) -> MemoryCheckpoint:
    return MemoryCheckpoint([capture(state, rank=0, world_size=1, declared=None)])


def calls_of(work: Callable[[], object]) -> int:
    """How often a function of Python was entered, or a generator went on."""
    calls = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def capturing(state: dict[str, Any]) -> Callable[[], object]:
    return lambda: capture(state, rank=0, world_size=1, declared=None)


def binding(state: dict[str, Any]) -> Callable[[], object]:
    listing = saved(state).listing()
    return lambda: bind(hold_models(state, rank=0, world_size=1, declared=None), listing)


def binding_without_states(state: dict[str, Any]) -> Callable[[], object]:
    listing = saved(state).listing()
    state["optimizer"].state.clear()
    return lambda: bind(hold_models(state, rank=0, world_size=1, declared=None), listing)


def loading(state: dict[str, Any]) -> Callable[[], object]:
    checkpoint = saved(state)
    listing = checkpoint.listing()
    return lambda: checkpoint.fill(bind(hold_models(state, rank=0, world_size=1, declared=None), listing))


@pytest.mark.parametrize("what", [capturing, binding, binding_without_states, loading])
def test_calls_for_a_parameter_do_not_grow_with_their_number(what: Callable[[dict[str, Any]], Callable[[], object]]) -> None:
    calls_of(what(state_of(FEW)))  # what is imported or asked once
    few, many = (calls_of(what(state_of(count))) / count for count in (FEW, MANY))
    assert many <= few * 1.05


@pytest.mark.parametrize("what", [capturing, binding, binding_without_states, loading])
def test_calls_for_a_group_do_not_grow_with_their_number(what: Callable[[dict[str, Any]], Callable[[], object]]) -> None:
    calls_of(what(state_of(FEW, groups=FEW)))
    few, many = (calls_of(what(state_of(count, groups=count))) / count for count in (FEW, MANY))
    assert many <= few * 1.05


def test_what_ddp_ignores_is_looked_for_once_for_all_parameters() -> None:
    def holding(parameters: int) -> Callable[[], object]:
        model = nn.ParameterDict({f"p{k}": nn.Parameter(torch.full((2,), float(k))) for k in range(parameters)})
        wrapped = DistributedDataParallel.__new__(DistributedDataParallel)  # without its process group, which is not asked
        nn.Module.__init__(wrapped)
        wrapped.module = model
        wrapped.process_group = None
        wrapped.parameters_to_ignore = {"p0"}
        return lambda: hold_module("model", wrapped, job=JobView(0, 1), identities=Identities())

    calls_of(holding(FEW))
    few, many = (calls_of(holding(count)) / count for count in (FEW, MANY))
    assert many <= few * 1.05
