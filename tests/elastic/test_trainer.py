"""Whole jobs under `elastickpt-run`: members are killed and raise at ordered moments. What everybody has afterwards is, bit for
bit, what one process has that takes the same steps and applies the formulas of the specification."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elastickpt.elastic.passage import Passing
from tests.elastic.simulated import Simulated

TRAINEE = Path(__file__).parent / "trainee.py"
RUN = "import sys; from elastickpt.cli.launch import main; sys.exit(main())"
LIMIT_S = 600.0
Event = dict[str, Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the members have: the backward of a norm sums by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def begun_job(folder: Path, *arguments: object, **told: object) -> subprocess.Popen[str]:
    """The launcher of a job that trains the small model."""
    folder.mkdir(exist_ok=True)
    script = [TRAINEE, json.dumps({"folder": str(folder), "faults": [], **told})]
    flags = ("--heartbeat", 120, "--events", folder / "events.jsonl")  # a loaded machine is no fault
    command = [sys.executable, "-c", RUN, *flags, *arguments, *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(one) for one in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def ended_job(folder: Path, launcher: subprocess.Popen[str], *, expected: int) -> list[Event]:
    """The events of a job that ends with this code."""
    try:
        told = launcher.communicate(timeout=LIMIT_S)
    finally:
        launcher.kill()
    assert launcher.returncode == expected, f"{launcher.returncode}\n{told[0]}\n{told[1]}"
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def run_job(folder: Path, *arguments: object, expected: int = 0, **told: object) -> list[Event]:
    """The events of a job that trains the small model."""
    return ended_job(folder, begun_job(folder, *arguments, **told), expected=expected)


def notes(folder: Path, kind: str, stage: int) -> list[dict[str, Any]]:
    """What the holders of a stage noted, in order."""
    files = sorted(folder.glob(f"{kind}-{stage}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [torch.load(path, weights_only=False) for path in files]


def assert_same(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_same(found[name], expected[name], f"{where}.{name}")
    else:
        assert found == expected, where


def assert_stands(note: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    assert_same({key: note[key] for key in expected}, expected, where)


def recoveries(events: list[Event]) -> list[tuple[object, ...]]:
    found = [one for one in events if one["event"] == "recovery"]
    return [(one["step"], one["rung"], [lost["stage"] for lost in one["lost"]], one["approximate"]) for one in found]


@pytest.mark.ranks
def test_middle_stages_are_lost_at_every_phase_of_a_step(tmp_path: Path) -> None:
    """[REC-1, REC-4, REC-10..16, REC-41, REC-42, REC-53, REC-58, REC-59]"""
    faults = [[2, 1, "forward"], [1, 2, "optimizer"], [3, 4, "evaluate"], [0, 5, "raise-forward"]]
    policy = {"optimizer": "average", "lr_mode": "multiply", "lr_factor": 1.15}
    events = run_job(tmp_path, "--stages", 5, "--spares", 3, faults=faults, until=6, evaluate=[4], policy=policy)
    assert recoveries(events) == [
        (1, "checkfree", [2], True),
        (3, "checkfree", [1], True),
        (4, "checkfree", [3], True),
        (5, "replay", [0], False),
    ]
    job = Simulated(5, Passing(12), clip=0.05)
    losses, reported, rebuilt = {}, {}, []
    for step, lost in ((1, 2), (2, None), (3, 1), (4, 3), (5, None), (6, None)):
        losses[step] = (job.take_step(), dict(enumerate(job.norms)))
        reported[step] = [job.state(stage) for stage in range(5)]
        if lost is not None:
            job.average(lost, moments=True, factor=1.15)
            rebuilt.append([job.state(stage) for stage in range(5)])
    rebuilt.append(reported[5])  # a replay changes nothing
    reported[4] = rebuilt[2]  # noted behind the evaluation
    for stage in range(5):
        assert [one["reported"] for one in notes(tmp_path, "report", stage)] == [
            one
            for one in range(1, 7)
            if (stage, one) != (1, 3)  # who takes a place reports the next step first
        ]
        for note in notes(tmp_path, "report", stage):
            step = note["reported"]
            assert (note["loss"], note["norms"]) == losses[step]
            assert_stands(note, reported[step][stage], f"step {step}, stage {stage}")
        found = notes(tmp_path, "rebuilt", stage)
        assert len(found) == 4
        for number, note in enumerate(found):
            assert_stands(note, rebuilt[number][stage], f"recovery {number}, stage {stage}")
    told = [one for one in events if one["event"] == "recovery"]
    reported = [dict(one) for note in notes(tmp_path, "report", 4) for one in note["recovered"]]
    assert reported == [{"generation": one["generation"], "seconds": one["seconds"]} for one in told]
    assert len({note["evaluated"] for stage in range(5) for note in notes(tmp_path, "report", stage)}) == 2


def evaluations(folder: Path, stages: int) -> list[list[tuple[int, float]]]:
    """Of each stage: behind which loop its holders evaluated, and what that came to, in order."""
    return [[(note["until"], note["evaluated"]) for note in notes(folder, "behind", stage)] for stage in range(stages)]


@pytest.mark.ranks
def test_who_takes_a_place_finds_its_way_into_the_loop_of_the_others(tmp_path: Path) -> None:
    """A stage is lost behind the decision of a step after which all evaluate; and in the second loop, from which all roll back
    to the very step where the first one ended. [REC-61]"""
    told: dict[str, Any] = {"earlier": [2], "until": 4, "behind": [2, 4], "evaluate": [2]}
    averaged, back = tmp_path / "averaged", tmp_path / "back"
    run_job(averaged, "--stages", 3, "--spares", 1, faults=[[1, 1, "optimizer"]], **told)
    first, *others = evaluations(averaged, 3)
    assert [one for one, _ in first] == [2, 4]
    assert others == [first, first]
    within = {note["evaluated"] for stage in range(3) for note in notes(averaged, "report", stage) if note["reported"] == 2}
    assert len(within) == 1

    policy = {"rungs": ["rollback"]}
    events = run_job(back, "--stages", 2, "--spares", 1, faults=[[1, 3, "forward"]], every=2, policy=policy, **told)
    assert recoveries(events) == [(2, "rollback", [1], False)]  # the step is that to which all go back
    kept, taken = evaluations(back, 2)
    assert [one for one, _ in kept] == [2, 4]
    assert taken[0] == kept[0]  # of the process that is lost
    assert math.isnan(taken[1][1])  # of the one that has its place
    assert taken[2:] == kept[1:]


@pytest.mark.long  # in its short form `test_chaos` has partners, too
@pytest.mark.ranks
def test_stages_of_end_pairs_are_copied_from_their_partners(tmp_path: Path) -> None:
    """[REC-6, REC-7, REC-10..16, REC-50, REC-58, REC-59]"""
    faults = [[0, 1, "backward"], [3, 2, "optimizer"], [1, 4, "boundary"], [2, 4, "boundary"]]
    events = run_job(tmp_path, "--stages", 4, "--spares", 4, faults=faults, until=5, swap="microbatch")
    found = recoveries(events)
    assert found[:2] == [(1, "partner", [0], True), (3, "partner", [3], True)]
    assert sorted(stage for one in found[2:] for stage in one[2]) == [1, 2]  # at once, or one in the recovery of the other
    job, losses = Simulated(4, Passing(12, swap="microbatch"), clip=0.05), {}
    rebuilt = []
    for step, copies in ((1, [(0, 1)]), (2, []), (3, [(3, 2)]), (4, [(1, 0), (2, 3)]), (5, [])):
        losses[step] = (job.take_step(), dict(enumerate(job.norms)))
        for lost, partner in copies:
            job.copy(lost, partner)
        if copies:
            rebuilt.append([job.state(stage) for stage in range(4)])
    for stage in range(4):
        for note in notes(tmp_path, "report", stage):
            assert (note["loss"], note["norms"]) == losses[note["reported"]]
        assert_stands(notes(tmp_path, "report", stage)[-1], job.state(stage), f"stage {stage}")
        for number, note in enumerate(notes(tmp_path, "rebuilt", stage)[:2]):
            assert_stands(note, rebuilt[number][stage], f"recovery {number}, stage {stage}")


@pytest.mark.ranks
def test_what_raises_twice_ends_the_job_with_the_users_error(tmp_path: Path) -> None:
    """On the member whose it is; the others hear of it. [REC-15]"""
    events = run_job(tmp_path, "--stages", 2, faults=[[1, 1, "raise-forward", 2]], until=3, expected=1)
    assert recoveries(events) == [(1, "replay", [1], False)]
    said = sorted(path.read_text() for path in tmp_path.glob("raised-*"))
    assert [one.partition(":")[0] for one in said] == ["RecoveryFailed", "ValueError"]
    assert said[0].startswith("RecoveryFailed: step-failed: step 2")
    assert said[1] == "ValueError: ordered: raise-forward at 1"
