"""Schedulers come back as they were, also when the groups of their optimizer are cut otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from elastickpt.errors import StateMismatch, ValueNotCarried
from elastickpt.format.records import Field
from elastickpt.testing.fingerprint import fingerprint
from elastickpt.testing.memory_checkpoint import MemoryCheckpoint
from elastickpt.training.capture import capture
from elastickpt.training.restore import bind

State = dict[str, Any]
Make = Callable[[Optimizer], LRScheduler]


class Warmup:
    """A callable with state of its own, which LambdaLR carries."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return min(1.0, (epoch + 1) / self.steps)


def sequential(o: Optimizer) -> LRScheduler:
    parts = [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, T_max=9)]
    return lr_scheduler.SequentialLR(o, parts, milestones=[2])


SCHEDULERS: dict[str, Make] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "lambda-object": lambda o: lr_scheduler.LambdaLR(o, [Warmup(3 + k) for k, _ in enumerate(o.param_groups)]),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, milestones=[1, 3, 3, 6]),
    "constant": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "sequential": sequential,
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=9),
    "warm-restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=40),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=[1e-5] * len(o.param_groups)),
}


def make_state(make: Make, seed: int, *lrs: float, reverse: bool = False) -> State:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    parts = [model[0], model[2]][:: -1 if reverse else 1]
    if len(lrs) == 1:
        groups: list[Any] = [{"params": [p for part in parts for p in part.parameters()], "lr": lrs[0]}]
    else:
        groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in zip(parts, lrs, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    return {"scheduler": make(optimizer), "model": model, "optimizer": optimizer}


def train(state: State, steps: int) -> list[list[float]]:
    """The learning rates of all groups after each step."""
    source, found = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        state["optimizer"].zero_grad()
        loss = state["model"](torch.randn(5, 3, generator=source)).square().mean()
        loss.backward()
        state["optimizer"].step()
        plateau = isinstance(state["scheduler"], lr_scheduler.ReduceLROnPlateau)
        state["scheduler"].step(*([1.0] if plateau else []))
        found.append([group["lr"] for group in state["optimizer"].param_groups])
    return found


def saved(state: State) -> MemoryCheckpoint:
    return MemoryCheckpoint([capture(state, rank=0, world_size=1, declared=None)])


def load(checkpoint: MemoryCheckpoint, state: State) -> None:
    checkpoint.fill(bind(state, rank=0, world_size=1, declared=None, listing=checkpoint.listing()))


def refused(checkpoint: MemoryCheckpoint, state: State) -> list[tuple[str, str]]:
    before = fingerprint(state)
    binding = bind(state, rank=0, world_size=1, declared=None, listing=checkpoint.listing())
    with pytest.raises(StateMismatch):
        checkpoint.fill(binding)
    assert fingerprint(state) == before
    return [(mismatch.name, mismatch.what) for mismatch in binding.mismatches]


def lambdas(state: State) -> list[object]:
    return [vars(one) for one in getattr(state["scheduler"], "lr_lambdas", ()) if isinstance(one, Warmup)]


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("lrs", [(0.1,), (0.1, 0.02)], ids=["one-group", "two-groups"])
def test_any_scheduler_is_restored_and_goes_on_alike(make: Make, lrs: tuple[float, ...]) -> None:
    original, other = make_state(make, 0, *lrs), make_state(make, 1, *(lr + 1 for lr in lrs))
    train(original, 4)
    load(saved(original), other)
    assert fingerprint(other) == fingerprint(original)
    assert lambdas(other) == lambdas(original)
    assert train(other, 6) == train(original, 6)
    assert fingerprint(other) == fingerprint(original)


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_any_scheduler_follows_its_groups_into_another_order(make: Make) -> None:
    original, other = make_state(make, 0, 0.1, 0.02), make_state(make, 1, 7.0, 8.0, reverse=True)
    train(original, 4)
    load(saved(original), other)
    assert train(other, 5) == [rates[::-1] for rates in train(original, 5)]


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_any_scheduler_over_one_group_can_go_on_over_two(make: Make) -> None:
    original, other = make_state(make, 0, 0.1), make_state(make, 1, 7.0, 8.0)
    train(original, 4)
    load(saved(original), other)
    assert train(other, 5) == [rates * 2 for rates in train(original, 5)]


def test_lists_by_group_are_columns_and_other_lists_stay_in_the_tree() -> None:
    state = make_state(SCHEDULERS["sequential"], 0, 0.1)
    checkpoint = saved(state)
    fields = {field.key: field for field in checkpoint.tables[0].fields if field.kind == "schedule"}
    assert fields["scheduler/_schedulers/0/base_lrs"] == Field(
        "schedule", "scheduler/_schedulers/0/base_lrs", (0.1,), (0, 0, 0, 0)
    )
    tree: Any = checkpoint.values["/scheduler"]
    assert tree["_schedulers"][0]["base_lrs"] is None
    assert tree["_milestones"] == [2]


def test_the_counter_of_milestones_stays_a_counter() -> None:
    original, other = make_state(SCHEDULERS["multi-step"], 0, 0.1), make_state(SCHEDULERS["step"], 1, 0.1)
    other = {**other, "scheduler": lr_scheduler.MultiStepLR(other["optimizer"], milestones=[5])}
    load(saved(original), other)
    assert type(other["scheduler"].milestones) is Counter
    assert other["scheduler"].milestones == Counter({1: 1, 3: 2, 6: 1})


def test_a_scheduler_whose_optimizer_is_not_in_state_is_carried_whole() -> None:
    original, other = make_state(SCHEDULERS["step"], 0, 0.1, 0.2), make_state(SCHEDULERS["step"], 1, 7.0, 8.0)
    del original["optimizer"], other["optimizer"]
    checkpoint = saved(original)
    assert checkpoint.values["/scheduler"]["base_lrs"] == [0.1, 0.2]  # type: ignore[index]
    load(checkpoint, other)
    assert fingerprint(other) == fingerprint(original)


def test_a_list_that_was_carried_whole_must_fit_the_groups() -> None:
    original, other = make_state(SCHEDULERS["step"], 0, 0.1, 0.2), make_state(SCHEDULERS["step"], 1, 7.0)
    del original["optimizer"], other["optimizer"]
    assert ("/scheduler/base_lrs", "value") in refused(saved(original), other)


def test_a_scheduler_needs_the_optimizer_that_had_its_lists() -> None:
    original, other = make_state(SCHEDULERS["step"], 0, 0.1), make_state(SCHEDULERS["step"], 1, 7.0)
    del other["optimizer"]
    assert refused(saved(original), other) == [("/scheduler", "value")]


def test_groups_joined_from_parameters_with_different_schedules_are_refused() -> None:
    original, other = make_state(SCHEDULERS["step"], 0, 0.1, 0.2), make_state(SCHEDULERS["step"], 1, 7.0)
    assert sorted(refused(saved(original), other)) == [
        ("/optimizer/param_groups/0/initial_lr", "value"),
        ("/optimizer/param_groups/0/lr", "value"),
        ("/scheduler/_last_lr/0", "value"),
        ("/scheduler/base_lrs/0", "value"),
    ]


def test_a_scheduler_that_the_checkpoint_lacks_is_missing() -> None:
    original, other = make_state(SCHEDULERS["step"], 0, 0.1), make_state(SCHEDULERS["step"], 1, 7.0)
    del original["scheduler"]
    assert refused(saved(original), other) == [("/scheduler", "missing")]


class Remembering(lr_scheduler.StepLR):
    """A list of its own that is as long as the groups only by chance."""

    def __init__(self, optimizer: Optimizer, seen: list[int]) -> None:
        self.seen = seen
        super().__init__(optimizer, step_size=2)


def test_a_list_that_goes_by_groups_on_one_side_only_is_refused() -> None:
    original = make_state(lambda o: Remembering(o, [5]), 0, 0.1)
    other = make_state(lambda o: Remembering(o, [6]), 1, 0.1, 0.1)
    assert refused(saved(original), other) == [("/scheduler/seen", "value")]


def test_a_function_in_a_scheduler_is_refused_with_its_place() -> None:
    state = make_state(SCHEDULERS["step"], 0, 0.1)
    state["scheduler"].hook = lambda: None
    with pytest.raises(ValueNotCarried, match="/scheduler/hook: function"):
        saved(state)


def test_tensor_learning_rates_are_kept_by_the_scheduler() -> None:
    def make(seed: int) -> State:
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1 * (seed + 1)))
        return {"model": model, "optimizer": optimizer, "scheduler": lr_scheduler.ExponentialLR(optimizer, 0.5)}

    original, other = make(0), make(1)
    train(original, 2)
    load(saved(original), other)
    assert fingerprint(other) == fingerprint(original)
    train(original, 2)
    train(other, 2)
    assert fingerprint(other) == fingerprint(original)
