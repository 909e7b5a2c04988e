"""Jobs with a run: stages from its checkpoints, rollbacks, the next start, with fewer stages too; bit for bit."""

from __future__ import annotations

import copy
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import elastickpt as ek
from elastickpt.elastic.passage import Passing
from elastickpt.elastic.stages import Place
from elastickpt.ledger.branch import history
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import EpochStart
from elastickpt.ledger.stored import list_commits, read_start
from elastickpt.storage.local import LocalStore
from tests.elastic.simulated import Simulated
from tests.elastic.small_model import build
from tests.elastic.test_trainer import LIMIT_S, assert_stands, begun_job, ended_job, notes, one_thread, recoveries, run_job

__all__ = ["one_thread"]  # a fixture
LAYERS = 6


def restored(stages: int, path: str, *, layers: int = LAYERS) -> Simulated:
    """A job by one process that goes on from a checkpoint."""
    job = Simulated(stages, Passing(12), clip=0.05, layers=layers)
    for stage in job.reference.stages:
        state = {"model": stage.module, "optimizer": stage.optimizer, "scheduler": stage.scheduler}
        job.step = ek.elastic.load_alone(state, path).step or 0
    return job


def put(job: Simulated, number: int, state: dict[str, Any]) -> None:
    """A stage has these tensors; where its scheduler stands does not change."""
    stage = job.reference.stages[number]
    stage.module.load_state_dict(state["model"])
    groups = stage.optimizer.state_dict()["param_groups"]
    stage.optimizer.load_state_dict({"state": copy.deepcopy(state["optimizer"]), "param_groups": groups})


def assert_followed(folder: Path, job: Simulated, until: int) -> None:
    """The job of the folder reported what this one does from here on."""
    losses = {}
    while job.step < until:
        loss = job.take_step()
        losses[job.step] = loss
    for stage in range(len(job.reference.stages)):
        found = notes(folder, "report", stage)
        assert {note["reported"]: note["loss"] for note in found} == losses
        assert_stands(found[-1], job.state(stage), f"stage {stage}")


@pytest.mark.long  # three jobs
@pytest.mark.ranks
def test_a_stage_from_the_newest_checkpoint_then_a_rollback_then_fewer_stages(tmp_path: Path) -> None:
    """[REC-12, REC-14, REC-43, REC-58, REC-60]"""
    run, told = str(tmp_path / "run"), {"every": 2, "layers": LAYERS}
    events = run_job(tmp_path, "--stages", 3, "--spares", 1, until=4, faults=[[1, 3, "forward"]], **told)
    assert recoveries(events) == [(3, "stale", [1], True)]
    job = Simulated(3, Passing(12), clip=0.05, layers=LAYERS)
    job.take_step()
    job.take_step()
    saved = job.state(1)
    job.take_step()
    put(job, 1, saved)
    for stage in range(3):
        (note,) = notes(tmp_path, "rebuilt", stage)
        assert_stands(note, job.state(stage), f"stage {stage} after 3 steps")
    job.take_step()
    for stage in range(3):
        assert_stands(notes(tmp_path, "report", stage)[-1], job.state(stage), f"stage {stage} after 4 steps")

    whole = build(Place(0, 1), Passing(12), layers=LAYERS).module
    assert ek.load({"model": whole}, f"{run}@latest", strict="missing").step == 4
    expected = {name: one for stage in range(3) for name, one in job.state(stage)["model"].items()}
    assert all(torch.equal(expected[name], one) for name, one in whole.state_dict().items())
    elastic = ek.open(f"{run}@latest").values["/elastic"]
    assert elastic == {
        "seed": 3,
        "lr_factors": {},
        "norms": {str(stage): norm for stage, norm in enumerate(job.norms)},
        "lineage": [{"step": 3, "stage": 1, "rung": "stale", "generation": recovery_generation(events)}],
    }

    second = tmp_path / "second"
    rollback = {"rungs": ["rollback"]}
    fault = [[2, 5, "boundary"]]
    events = run_job(second, "--stages", 3, "--spares", 1, until=7, faults=fault, run=run, policy=rollback, **told)
    assert recoveries(events) == [(4, "rollback", [2], False)]
    for stage in range(3):
        assert [note["reported"] for note in notes(second, "report", stage)] == [5, 5, 6, 7]
    assert_followed(second, restored(3, f"{run}@4"), 7)

    third = tmp_path / "third"
    run_job(third, "--stages", 2, until=8, run=run, **told)
    assert_followed(third, restored(2, f"{run}@6"), 8)


def recovery_generation(events: list[dict[str, Any]]) -> int:
    return int(next(one for one in events if one["event"] == "recovery")["generation"])


def plain_run(root: Path, *, layers: int, steps: int) -> None:
    """A run of a plain job, by one process, that has completed so many steps."""
    job = Simulated(1, Passing(12), clip=0.05, layers=layers)
    for _ in range(steps):
        job.take_step()
    (stage,) = job.reference.stages
    with ek.Run(root, {"model": stage.module, "optimizer": stage.optimizer}) as run:
        run.restore()
        run.save(steps).result()


@pytest.mark.ranks
def test_saves_outlive_losses_and_a_plain_job_may_have_begun_the_run(tmp_path: Path) -> None:
    """With live replicas. Whoever is lost while a save is under way, it is whole or there is none, soon; a due step that is
    reached by rolling forward is saved. The writer processes of the others stay. [REC-58, REC-60, REC-66, REC-63, REC-65]"""
    root, layers = tmp_path / "run", 8
    plain_run(root, layers=layers, steps=1)
    swap, policy = "microbatch", {"rungs": ["partner", "checkfree"]}
    faults = [[1, 3, "optimizer"], [2, 6, "staged"], [0, 8, "handed-over"]]
    arguments = ("--stages", 4, "--spares", 3)
    told = {"swap": swap, "layers": layers, "run": str(root), "every": 2, "keep": 3, "policy": policy}
    events = run_job(tmp_path, *arguments, faults=faults, until=11, **told)
    assert [one[1:3] for one in recoveries(events)] == [("partner", [1]), ("partner", [2]), ("partner", [0])]

    reports = {stage: {one["reported"]: one for one in notes(tmp_path, "report", stage)} for stage in range(4)}
    assert {min(one) for one in reports.values()} == {2}
    saved = {step: [one[step]["saved"] for one in reports.values() if step in one] for step in (2, 6, 8, 10)}
    whole_or_none = {step: {error for error, _ in found} == {"NoneType"} for step, found in saved.items()}
    assert (whole_or_none[2], whole_or_none[10]) == (True, True)
    assert all((error != "NoneType", seconds < 50.0) == (True, True) for error, seconds in saved[6])
    kept = [one.step for one in history(root) if one.state == "live"]
    assert 8 in kept or not whole_or_none[8]
    assert kept == ([10, 8, 4, 1] if 8 in kept else [10, 4, 2, 1])  # step 1 is the newest that was verified [RUN-87]
    (writers,) = {tuple(one["writers"]) for one in reports[3].values()}
    assert len(writers) == 1

    whole = build(Place(0, 1), Passing(12), layers=layers).module
    assert ek.load({"model": whole}, f"{root}@latest", strict="missing").step == 10
    noted = {name: one for stage in range(4) for name, one in reports[stage][10]["model"].items()}
    assert all(torch.equal(noted[name], one) for name, one in whole.state_dict().items())
    assert ek.open(f"{root}@latest").verify().problems == ()  # every element is there once, those of both replicas too
    for stage in restored(8, f"{root}@latest", layers=layers).reference.stages:
        assert all(torch.equal(noted[name], one) for name, one in stage.module.state_dict().items())
    words = [one.keep for one in starts(root)]
    assert words == ["all", "last=3"]


@pytest.mark.ranks
def test_a_job_whose_run_is_taken_over_ends_and_the_other_one_saves_when_it_is_told_to_end(tmp_path: Path) -> None:
    """[REC-63, REC-64, CLI-90, CLI-92]"""
    folders, root = [tmp_path / "first", tmp_path / "second"], tmp_path / "run"
    told = {"run": str(root), "until": 1_000_000, "note": False, "layers": 2, "pause": 0.2}  # seconds: the others have to start
    first = begun_job(folders[0], "--stages", 2, every=1, **told)
    until(lambda: newest(root), first)
    busy = run_job(tmp_path / "busy", "--stages", 2, every=1, expected=1, **told)
    assert "run-busy" in busy[-1]["why"]
    second = begun_job(folders[1], "--stages", 2, every=1000, take_over=True, **told)
    ended = ended_job(folders[0], first, expected=76)[-1]
    assert (ended["event"], ended["code"]) == ("ended", 76)
    assert "superseded" in ended["why"]
    until(lambda: "member" in (folders[1] / "events.jsonl").read_text() and (folders[1] / "begun").exists(), second)
    second.send_signal(signal.SIGTERM)
    ended = ended_job(folders[1], second, expected=75)[-1]
    entry = history(root)[0]
    assert (entry.epoch, entry.step) == (2, ended["step"])


def newest(root: Path) -> int:
    try:
        return history(root)[0].step
    except (IndexError, ek.errors.CheckpointError):
        return 0


def until(holds: Callable[[], object], launcher: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT_S
    while not holds():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def starts(root: Path) -> list[EpochStart]:
    """The starts of a run's epochs, in their order."""
    store = LocalStore(root)
    return [complete(read_start(store, epoch)) for epoch in sorted(complete(list_commits(store)).starts)]
