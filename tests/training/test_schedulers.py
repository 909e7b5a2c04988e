"""Schedulers come back as they were, also when the groups of their optimizer are cut otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import fingerprint
from memory_checkpoint import MemoryCheckpoint
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

import elastickpt as ek
from elastickpt.errors import StateMismatch, ValueNotCarried
from elastickpt.format.records import Field
from elastickpt.training.capture import capture
from elastickpt.training.restore import bind, hold_models

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
    checkpoint.fill(bind(hold_models(state, rank=0, world_size=1, declared=None), checkpoint.listing()))


def refused(checkpoint: MemoryCheckpoint, state: State) -> list[tuple[str, str]]:
    before = fingerprint(state)
    binding = bind(hold_models(state, rank=0, world_size=1, declared=None), checkpoint.listing())
    with pytest.raises(StateMismatch):
        checkpoint.fill(binding)
    assert fingerprint(state) == before
    return [(mismatch.name, mismatch.what) for mismatch in binding.mismatches]


def state_of(state: State) -> object:
    return fingerprint({"scheduler": state["scheduler"]})


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


def bound(checkpoint: MemoryCheckpoint, state: State) -> tuple[str, ...]:
    """Loads what is there, as under strict="none", and gives the notes; asserts that only an optimizer is missing."""
    binding = bind(hold_models(state, rank=0, world_size=1, declared=None), checkpoint.listing())
    assert [(one.name, one.what) for one in binding.mismatches if one.name != "/other"] == []
    checkpoint.fill(replace(binding, mismatches=()))
    return binding.notes


ALIKE_FOR_ALL_GROUPS = sorted(SCHEDULERS.keys() - {"lambda-object"})  # but for what they have by group


@pytest.mark.parametrize("name", ALIKE_FOR_ALL_GROUPS)
def test_a_scheduler_whose_optimizer_is_left_out_takes_the_lists_by_name(name: str) -> None:
    """[UCF-89] The groups stand in another order: the model gives their parameters' names."""
    make = SCHEDULERS[name]
    original, other = make_state(make, 0, 0.1, 0.02), make_state(make, 1, 7.0, 8.0, reverse=True)
    train(original, 4)
    (note,) = bound(saved(original), {"model": other["model"], "scheduler": other["scheduler"]})
    assert "is not in `state`: entries of its groups come from 'optimizer' in the checkpoint, by the names" in note
    reversed_ = make_state(make, 0, 0.02, 0.1, reverse=True)
    train(reversed_, 4)
    assert state_of(other) == state_of(reversed_)


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_a_scheduler_alone_takes_the_lists_by_the_places_of_groups(make: Make) -> None:
    original, other = make_state(make, 0, 0.1, 0.02), make_state(make, 1, 7.0, 8.0)
    train(original, 4)
    bound(saved(original), {"scheduler": other["scheduler"]})
    assert state_of(other) == state_of(original)


def test_a_scheduler_alone_says_where_its_lists_come_from() -> None:
    original, other = make_state(SCHEDULERS["step"], 0, 0.1), make_state(SCHEDULERS["step"], 1, 7.0)
    (note,) = bound(saved(original), {"scheduler": other["scheduler"]})
    assert note == (
        "/scheduler: its optimizer is not in `state`: entries of its groups come from 'optimizer' in the checkpoint, "
        "by the places of groups, as their parameters have no names here"
    )


def test_a_scheduler_alone_over_other_groups_takes_what_all_agree_on() -> None:
    original = make_state(SCHEDULERS["step"], 0, 0.1)
    train(original, 3)
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(2))]}, {"params": [nn.Parameter(torch.zeros(3))]}], lr=3.0
    )
    scheduler = SCHEDULERS["step"](optimizer)
    bound(saved(original), {"scheduler": scheduler})
    assert scheduler.base_lrs == [0.1, 0.1]
    assert scheduler.last_epoch == 3
    one = SCHEDULERS["step"](torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=3.0))
    original = make_state(SCHEDULERS["step"], 0, 0.1, 0.2)
    assert refused(saved(original), {"scheduler": one}) == [("/scheduler/base_lrs", "value"), ("/scheduler/_last_lr", "value")]


@pytest.mark.parametrize("strict", ["missing", "none"])
def test_a_scheduler_alone_is_loaded_from_disk(strict: Any, tmp_path: Path) -> None:
    """[UCF-153] On disk parameters stand sorted by name, so that their places say nothing of groups."""
    original, other = make_state(SCHEDULERS["step"], 0, 0.1, 0.02, reverse=True), make_state(SCHEDULERS["step"], 1, 7.0, 8.0)
    train(original, 3)
    ek.save(original, tmp_path / "c")
    report = ek.load({"scheduler": other["scheduler"]}, tmp_path / "c", strict=strict)
    assert state_of(other) == state_of(original)
    assert len(report.notes) == 1


def test_an_optimizer_under_another_key_is_found_by_identity() -> None:
    original, other = make_state(SCHEDULERS["step"], 0, 0.1, 0.02), make_state(SCHEDULERS["step"], 1, 7.0, 8.0, reverse=True)
    train(original, 3)
    renamed = {"model": other["model"], "other": other["optimizer"], "scheduler": other["scheduler"]}
    notes = bound(saved(original), renamed)
    assert other["scheduler"].base_lrs == [0.02, 0.1]
    assert any("its optimizer stands under 'other' in `state`" in note for note in notes)


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
    """A list that grows, and one that goes by groups, which only its class can say."""

    elastickpt_group_lists = ("warmups",)

    def __init__(self, optimizer: Optimizer, history: list[int], warmups: list[int] | None = None) -> None:
        self.history = history
        self.warmups = warmups
        super().__init__(optimizer, step_size=2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("entries", [0, 1, 2, 3])
@pytest.mark.parametrize("live", [0, 1, 2])
def test_a_list_of_its_own_is_loaded_at_its_saved_length(groups: int, entries: int, live: int) -> None:
    """[UCF-89] By its length such a list could be taken for one over groups, on either side."""
    original = make_state(lambda o: Remembering(o, [5 + k for k in range(entries)]), 0, *(0.1, 0.2)[:groups])
    other = make_state(lambda o: Remembering(o, [0] * live), 1, *(7.0, 8.0)[:groups])
    load(saved(original), other)
    assert other["scheduler"].history == [5 + k for k in range(entries)]
    assert fingerprint(other) == fingerprint(original)


def test_a_list_of_its_own_does_not_follow_groups_that_are_cut_otherwise() -> None:
    original = make_state(lambda o: Remembering(o, [5]), 0, 0.1)
    other = make_state(lambda o: Remembering(o, [6, 7]), 1, 0.1, 0.1)
    load(saved(original), other)
    assert other["scheduler"].history == [5]


def test_a_list_that_its_class_declares_follows_its_groups() -> None:
    original = make_state(lambda o: Remembering(o, [5, 6], [1, 2]), 0, 0.1, 0.2)
    other = make_state(lambda o: Remembering(o, [], [8, 9]), 1, 7.0, 8.0, reverse=True)
    load(saved(original), other)
    assert other["scheduler"].warmups == [2, 1]
    assert other["scheduler"].history == [5, 6]


def test_a_list_that_an_older_release_took_for_one_over_groups_is_loaded() -> None:
    """Until now a list went by groups if it was as long as they are; such a checkpoint has it in columns."""
    original = make_state(lambda o: Remembering(o, [5, 6]), 0, 0.1, 0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remembering, "elastickpt_group_lists", ("history",))
        checkpoint = saved(original)
    assert any(field.key == "scheduler/history" for field in checkpoint.tables[0].fields)
    for live in ([], [0], [0, 0], [0, 0, 0]):
        other = make_state(lambda o, live=live: Remembering(o, live), 1, 7.0, 8.0)  # type: ignore[misc]
        load(checkpoint, other)
        assert other["scheduler"].history == [5, 6]


def test_a_function_in_a_scheduler_is_refused_with_its_place() -> None:
    state = make_state(SCHEDULERS["step"], 0, 0.1)
    state["scheduler"].hook = lambda: None
    with pytest.raises(ValueNotCarried, match="/scheduler/hook: function"):
        saved(state)


def with_empty_group(seed: int, lr: float) -> State:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": lr}, {"params": [], "lr": lr / 2}], momentum=0.9)
    return {"model": model, "optimizer": optimizer, "scheduler": lr_scheduler.ExponentialLR(optimizer, 0.5)}


@pytest.mark.parametrize("layout", ["same", "another"])
def test_a_group_without_parameters_gets_its_options_and_entries_back(layout: str) -> None:
    """[UCF-154] And nothing is said of it."""
    original, other = with_empty_group(0, 0.1), with_empty_group(1, 7.0)
    original["optimizer"].step()
    original["scheduler"].step()
    checkpoint = saved(original)
    listing = checkpoint.listing() if layout == "same" else replace(checkpoint.listing(), same_layout=False)
    binding = bind(hold_models(other, rank=0, world_size=1, declared=None), listing)
    assert binding.notes == ()
    checkpoint.fill(binding)
    assert fingerprint(other) == fingerprint(original)
    assert [group["lr"] for group in other["optimizer"].param_groups] == [0.05, 0.025]
    assert other["scheduler"].base_lrs == [0.1, 0.05]


def test_a_group_without_parameters_that_the_checkpoint_lacks_is_said_once() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    original = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}
    other = with_empty_group(1, 7.0)
    del other["scheduler"]
    binding = bind(hold_models(other, rank=0, world_size=1, declared=None), saved(original).listing())
    (note,) = [note for note in binding.notes if "param_groups/1" in note]
    assert note == "/optimizer/param_groups/1 has no parameters, and the checkpoint has no such group there: its options stay"


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
