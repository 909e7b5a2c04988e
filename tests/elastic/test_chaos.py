"""Stages are lost at every phase of a step, and training goes on from the right state, bit for bit: the short form of
`make chaos-recovery`; and that its judge finds what it is to find. [REC-1, REC-4, REC-10..16, REC-50..59]"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console

from tools.chaos.recovery import Job, Verdict, carry_out, judged
from tools.chaos.recovery_model import Led
from tools.chaos.recovery_plans import PHASES, STAGES, VICTIMS, at_random, matrix, short, without_spares
from tools.chaos.recovery_report import LONG, from_json, plans, render, to_json

LIMIT_S = 280.0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the members have: the backward of a norm sums by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.ranks
def test_stages_are_lost_at_every_phase_of_a_step() -> None:
    """Each phase once, with another victim each time; and all roll back in an evaluation. [REC-61]"""
    (plan,) = short(1)
    verdict = carry_out(plan, limit_s=LIMIT_S, goes_on_s=LIMIT_S)
    assert verdict.bad == {}
    assert {"partner", "checkfree", "stale", "rollback"} <= set(verdict.rungs)


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.parametrize("number", range(len(plans(LONG, 1, 200))))
def test_the_matrix(number: int) -> None:
    verdict = carry_out(plans(LONG, 1, 200)[number], limit_s=LIMIT_S, goes_on_s=LIMIT_S)
    assert verdict.bad == {}


def test_the_matrix_has_every_phase_with_every_victim() -> None:
    struck = [(fault.phase, fault.stages, plan.swap) for plan in matrix(1) for fault in plan.faults]
    for phase in PHASES:
        for name, stages in VICTIMS.items():
            swap = None if name == "embedding holder" else "microbatch"
            assert (phase, stages, swap) in struck
    assert sum(plan.cases for plan in matrix(1)) == len(PHASES) * len(VICTIMS) == 56
    assert sum(plan.cases for plan in without_spares(1)) == 14
    assert sum(plan.cases for plan in at_random(1, 200, stops=False)) == 200


def test_a_seed_draws_the_same_faults() -> None:
    assert plans(LONG, 7, 30) == plans(LONG, 7, 30)
    assert plans(LONG, 7, 30) != plans(LONG, 8, 30)


# -- what the judge finds


def undisturbed() -> tuple[Job, Led]:
    """A job of two steps whose members had the right state, and none of them was lost."""
    led = Led(STAGES, None, microbatches=12)
    notes: list[dict[str, Any]] = []
    for step in (1, 2):
        led.to(step)
        (loss,) = led.losses[step]
        notes += [
            {"kind": "report", "at": float(step), "pid": 1, "stage": stage, "step": step, "generation": 1, "loss": loss}
            | {"digest": led.digest(stage)}
            for stage in range(STAGES)
        ]
    job = Job(code=0, events=[{"event": "ended", "code": 0, "why": "done"}], notes=notes)
    return job, Led(STAGES, None, microbatches=12)


PLAN = dataclasses.replace(matrix(1)[0], faults=(), until=2, swap=None)


def test_a_job_that_nothing_disturbed_is_fine() -> None:
    job, led = undisturbed()
    assert judged(PLAN, job, led, 15.0) == {}


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ({"digest": "0"}, "stage 5 after step 2: another state"),
        ({"loss": 0.5}, "stage 5 after step 2: loss 0.5"),
        ({"step": 1}, "stage 5 after step 1: another state"),
    ],
)
def test_a_member_with_another_state_is_torn(what: dict[str, Any], found: str) -> None:
    job, led = undisturbed()
    job.notes[-1] |= what
    assert found in judged(PLAN, job, led, 15.0)["torn"]


def test_a_recovery_that_the_specification_does_not_have_is_torn() -> None:
    """Two adjacent stages are lost, and one of them was made of the other."""
    job, led = undisturbed()
    lost = [
        {"stage": 2, "rung": "stale", "from": {"path": "x", "step": 0}},
        {"stage": 3, "rung": "checkfree", "from": {"stages": [2, 4], "alpha": 0.5}},
    ]
    job.events.insert(0, {"event": "recovery", "generation": 2, "step": 2, "lost": lost[1:] + lost[:1]})
    assert "stage 3 is made of [2, 4], while [2, 3] are lost" in judged(PLAN, job, led, 15.0)["torn"]


def test_who_waits_too_long_hangs() -> None:
    job, led = undisturbed()
    job.notes.append({"kind": "fault", "at": 1.5, "number": 0})
    for note in job.notes:
        note["at"] += 20.0 * (note.get("step") == 2)
    job.notes.sort(key=lambda note: float(note["at"]))
    plan = dataclasses.replace(PLAN, faults=matrix(1)[0].faults[:1])
    assert judged(plan, job, led, 15.0)["hang"].startswith("20.5 s until the step behind Fault(phase='forward'")


def test_what_grows_is_a_leak() -> None:
    job, led = undisturbed()
    job.notes.append(
        {"kind": "held", "at": 3.0, "pid": 7, "stage": 1, "bound": {"threads": 3}, "found": {"threads": 4}, "threads": []}
    )
    assert "stage 1, process 7: {'threads': (3, 4)}" in judged(PLAN, job, led, 15.0)["leak"]


def test_a_job_that_does_not_end_hangs() -> None:
    job, led = undisturbed()
    job.code = None
    assert "no end" in judged(PLAN, job, led, 15.0)["hang"]


def test_a_record_is_read_as_it_was_written() -> None:
    plans = [*matrix(1), *at_random(1, 10, stops=True)]
    verdicts = [Verdict(plan, {"hang": "x"}, ("stale",), 1.5, 2.5, ((1, 0.5),)) for plan in plans]
    assert from_json(to_json(verdicts, 7, "2026-11-29")) == (verdicts, 7)
    with pytest.raises(ValueError, match="expected a record of recoveries"):
        from_json("{}")


def test_a_table_has_a_row_for_each_kind_of_fault(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = [Verdict(plan, {}, ("stale", "stale"), 1.5, 2.5, ()) for plan in matrix(1)]
    Console(width=200).print(render(verdicts, 1))
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line.split("│") for line in lines if "during a save" in line)
    assert [cell.strip() for cell in row[1:8]] == ["during a save", "1", "6", "0", "0", "0", "0"]
