"""What members agree on before they train, the factors of learning rates, and which steps are reported: values only."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as replace_commit
from torch import nn

from elastickpt.elastic.alike import About, about, in_order, why_apart
from elastickpt.elastic.history import History, scaled
from elastickpt.elastic.messages import Commit, Go
from elastickpt.elastic.passage import Passing
from elastickpt.elastic.policy import Policy
from elastickpt.elastic.recovery import From, Moved, Recovery, Seconds
from elastickpt.elastic.reports import Reports
from elastickpt.elastic.script import Position
from elastickpt.elastic.stages import Place, Stage
from elastickpt.elastic.view_passage import require_equal_replicas
from elastickpt.errors import Refused
from tests.elastic.small_model import build


def members(stages: int, passing: Passing) -> list[About]:
    return [about(build(Place(stage, stages), passing), stage) for stage in range(stages)]


@pytest.mark.parametrize(
    ("stages", "passing"),
    [
        (1, Passing(1)),
        (4, Passing(4)),
        (6, Passing(12, swap="microbatch")),
        (4, Passing(4, swap="step")),
        (3, Passing(2, "gpipe")),
    ],
)
def test_stages_of_one_model_fit(stages: int, passing: Passing) -> None:
    assert why_apart(members(stages, passing), passing, equal=True) == ""


@pytest.mark.parametrize(
    ("stages", "passing", "said"),
    [
        (4, Passing(3), "microbatches=3 with 4 stages under 1f1b: expected at least 4"),
        (4, Passing(6, swap="microbatch"), "expected at least 8, as each of two flushes needs one per stage"),
        (4, Passing(1, "gpipe", "microbatch"), "microbatches=1: expected at least one in each flush"),
    ],
)
def test_too_few_microbatches_are_refused(stages: int, passing: Passing, said: str) -> None:
    assert said in why_apart(members(stages, passing), passing, equal=False)


def changed(one: About, **changes: Any) -> About:
    fields = {name: getattr(one, name) for name in one.__struct_fields__}
    return About(**{**fields, **changes})


class Prefilled:
    """What others have told already."""

    def __init__(self, **told: bytes) -> None:
        self.told = told

    def set(self, key: str, value: bytes) -> None:
        self.told[key] = value

    def get(self, key: str, *, limit_s: float) -> bytes:
        return self.told[key]

    def get_all(self, keys: Sequence[str], *, limit_s: float) -> list[bytes]:
        return [self.get(key, limit_s=limit_s) for key in keys]


@pytest.mark.parametrize("number", [0, 1])
def test_replicas_that_differ_at_the_start_are_refused(number: int) -> None:
    """[REC-55]"""
    passing, stages = Passing(8, swap="step"), 4
    built = [build(Place(stage, stages), passing) for stage in range(stages)]
    exchange = Prefilled()
    for stage in range(1, stages):
        with suppress(KeyError):  # stage 0 is the last one to tell
            require_equal_replicas(built[stage], Place(stage, stages), exchange)
    require_equal_replicas(built[0], Place(0, stages), exchange)
    with torch.no_grad():
        built[number].tensors["embed"]["embed.weight"][0, 0] += 1
    said = "'embed.weight' begins with other values on stage 0 than on stage 1, which has a replica of it"
    with pytest.raises(Refused, match=said):
        require_equal_replicas(built[number], Place(number, stages), exchange)


def test_stages_that_cannot_stand_in_for_each_other_are_named() -> None:
    """[REC-54]"""
    fit = members(4, Passing(4))
    deeper = [*fit[2].parts["body"], ("layers.9.extra", "float32", (3,))]
    found = [*fit[:2], changed(fit[2], parts={"body": deeper}), fit[3]]
    assert why_apart(found, Passing(4), equal=False) == ""
    assert "only stage 2 has 'layers.9.extra', float32 (3,)" in why_apart(found, Passing(4), equal=True)
    wider = [(name, "float64", shape) for name, _, shape in fit[2].parts["body"]]
    said = why_apart([*fit[:2], changed(fit[2], parts={"body": wider}), fit[3]], Passing(4), equal=True)
    assert (
        "body of stages 0 and 2: 'layers.0.linear.bias', float32 (8,), of the one is 'layers.4.linear.bias', float64 (8,)"
        in said
    )


def test_what_one_stage_gives_the_next_one_takes() -> None:
    fit = members(4, Passing(4))
    found = [fit[0], changed(fit[1], example=[("float32", (7, 8)), ("float32", (6, 8))]), *fit[2:]]
    assert why_apart(found, Passing(4), equal=True) == "stage 0 gives float32 (6, 8) to stage 1, which takes float32 (7, 8)"


def test_a_refusal_of_one_member_is_that_of_all() -> None:
    fit = members(2, Passing(2))
    assert why_apart([fit[0], About(1, refused="no loss")], Passing(2), equal=True) == "stage 1: no loss"


def test_replicas_have_the_same_names() -> None:
    passing = Passing(8, swap="step")
    fit = members(4, passing)
    parts = {**fit[3].parts, "head": [("other.weight", *fit[3].parts["head"][1][1:])]}
    said = why_apart([*fit[:3], changed(fit[3], parts=parts)], passing, equal=True)
    assert said.startswith("head of stages 2 and 3")
    assert said.endswith("these are replicas")


@settings(deadline=None)
@given(st.permutations(["h.10.w", "h.9.w", "h.9.b", "g.2.1", "g.11.0"]))
def test_the_order_of_tensors_is_by_kind_and_number(names: list[str]) -> None:
    tensors = {name: torch.zeros(1) for name in names}
    assert [name for name, _ in in_order(tensors)] == ["g.2.1", "g.11.0", "h.9.b", "h.9.w", "h.10.w"]


def test_factors_hold_for_single_parameters_while_the_optimizer_steps() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters(), "lr": 0.25}], lr=1
    )
    stage = Stage(model, optimizer)
    groups = list(optimizer.param_groups)
    with scaled(stage, {"0.weight": 1.5, "1.weight": 3.0, "1.bias": 3.0}):
        seen = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
        optimizer.param_groups[0]["note"] = "written by the optimizer"
    rates = {name: seen[id(one)] for name, one in model.named_parameters()}
    assert rates == {"0.weight": 0.75, "0.bias": 0.5, "1.weight": 0.75, "1.bias": 0.75}
    assert all(one is two for one, two in zip(optimizer.param_groups, groups, strict=True))
    assert [group["lr"] for group in groups] == [0.5, 0.25]
    assert groups[0]["note"] == "written by the optimizer"
    assert [len(group["params"]) for group in groups] == [2, 2]


def test_factors_are_put_back_when_the_step_raises() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(RuntimeError), scaled(Stage(model, optimizer), {"weight": 2.0}):
        raise RuntimeError
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_factors_are_set_or_multiplied_up_to_a_cap() -> None:
    assert [Policy().factor_after(one) for one in (1.0, 1.1)] == [1.1, 1.1]
    paper = Policy(lr_mode="multiply")
    assert [paper.factor_after(one) for one in (1.0, 1.1, 1.2)] == [1.1, 1.2, 1.2]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda made: torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step)),
        lambda made: torch.optim.lr_scheduler.MultiplicativeLR(made, lambda step: 0.5 + step / 10),
        lambda made: torch.optim.lr_scheduler.ExponentialLR(made, 0.5),
        lambda made: torch.optim.lr_scheduler.CosineAnnealingLR(made, 5),
    ],
)
@pytest.mark.parametrize("rate", [0.25, torch.tensor(0.25)])
def test_a_factor_stands_on_top_of_what_the_scheduler_says(scheduler: Any, rate: Any) -> None:
    """However the scheduler finds its next value. [REC-59]"""
    seen: dict[float, list[float]] = {}
    for factor in (1.0, 1.5):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate if isinstance(rate, float) else rate.clone())
        stage = Stage(model, optimizer, scheduler=scheduler(optimizer))
        model(torch.ones(1, 2)).sum().backward()
        seen[factor] = []
        for _ in range(4):
            with scaled(stage, {"weight": factor}):
                seen[factor].append(float(optimizer.param_groups[0]["lr"]))
                optimizer.step()
            stage.scheduler.step()
    assert seen[1.5] == pytest.approx([1.5 * one for one in seen[1.0]])
    assert len(set(seen[1.0])) == 4


def test_a_history_survives_its_own_state() -> None:
    one = History(3, {"w": 1.1}, {0: 0.5, 11: 2.0}, [{"step": 4, "stage": 1, "rung": "checkfree", "generation": 2}])
    other = History()
    other.load_state_dict(one.state_dict())
    assert other == one
    other.put_factors(["w", "v"], {"v": 1.2})
    assert other.lr_factors == {"v": 1.2}
    assert one.lr_factors == {"w": 1.1}


@pytest.mark.parametrize(
    ("rungs", "swap", "equal"),
    [
        (("stale", "rollback"), "step", False),
        (("partner", "rollback"), None, False),
        (("partner",), "step", True),
        (("checkfree",), None, True),
    ],
)
def test_stages_have_to_be_alike_where_one_may_be_made_of_others(rungs: Any, swap: Any, *, equal: bool) -> None:
    assert Policy(rungs=rungs).needs_equal_stages(swap) is equal


@pytest.mark.parametrize(
    "values",
    [
        {"rungs": ("stale", "luck")},
        {"rungs": ("stale", "stale")},
        {"weighting": "max"},
        {"optimizer": "keep"},
        {"lr_factor": 0.0},
        {"max_stale_steps": -1},
        {"max_losses_of_step": 0},
        {"spare_wait_s": -1.0},
        {"lr_mode": "add"},
    ],
)
def test_policies_that_mean_nothing_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(values))):
        Policy(**values)


def commit(step: int) -> Commit:
    return Commit(1, step, (1.0, None), 2.0)


def told(reports: Reports) -> list[int]:
    found = []
    while (one := reports.next(1, 1)) is not None:
        found.append(one.step)
    return found


def test_every_committed_step_is_reported_once() -> None:
    reports = Reports()
    reports.arrived(Go(1, 0, None))
    assert told(reports) == []
    reports.committed(commit(1))
    assert told(reports) == [1]
    reports.committed(commit(2))  # and a view comes before the report
    reports.arrived(Go(2, 2, commit(2)))
    assert told(reports) == [2]
    reports.arrived(Go(3, 2, commit(2)))  # replayed
    assert told(reports) == []
    reports.arrived(Go(4, 3, commit(3)))  # rolled forward: stepped without a commit of its own
    assert told(reports) == [3]
    reports.committed(commit(4))
    reports.rolled_back(2)
    reports.arrived(Go(5, 2, None))
    assert told(reports) == []
    reports.committed(commit(3))
    assert told(reports) == [3]


def test_a_report_says_when_what_ran_after_a_recovery_began() -> None:
    """Which is not known when the members hear of the recovery. [REC-41, REC-42]"""
    seconds = Seconds(0.01, 0.02, 0.03, 0.04)
    made = Recovery(0.0, 1, 2, 0, "replay", (), "replay", False, From(()), (), seconds, Moved())
    other = replace(made, generation=3)
    reports = Reports()
    reports.arrived(Go(2, 0, None))
    reports.recovered(made)
    reports.recovered(other)  # the one before was overtaken: nothing ran after it
    reports.committed(replace_commit(commit(1), begun=((3, 0.25), (9, 1.0))))
    report = reports.next(1, 3)
    assert report is not None
    assert [one.seconds.first_microbatch for one in report.recovered] == [None, 0.25]
    assert report.recovered[0] is made
    assert report.recovered[1].seconds == replace(seconds, first_microbatch=0.25)


@pytest.mark.parametrize(
    ("evaluating", "position", "expected"),
    [
        (False, Position(since=1), []),
        (True, Position(since=1), [7]),
        (False, Position(since=1, values=(0.5,)), []),
        (True, Position(part=2, since=2), []),  # they are on the way back to where their loop ended
        (True, None, []),  # all are new
    ],
)
def test_a_replacement_reports_the_last_step_again_only_to_join_an_evaluation(
    evaluating: bool, position: Position | None, expected: list[int]
) -> None:
    reports = Reports()
    reports.arrived(Go(2, 7, commit(7), evaluating=evaluating, position=position))
    assert told(reports) == expected
    reports.repeat()  # as the others do evaluate, as it shows later
    assert told(reports) == [7]
    reports.committed(commit(8))
    assert told(reports) == [8]


def test_a_rollback_to_the_newest_step_leaves_its_report() -> None:
    reports = Reports()
    reports.arrived(Go(1, 0, None))
    reports.committed(commit(1))
    assert reports.is_due_of(1)
    reports.rolled_back(1)
    assert told(reports) == [1]
    reports.committed(commit(2))
    reports.rolled_back(1)
    assert told(reports) == []
    assert not reports.is_due_of(1)
