"""Jobs with a run: stages from its checkpoints, rollbacks, the next start, with fewer stages too; bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import elastickpt as ek
from elastickpt.elastic.passage import Passing
from elastickpt.elastic.stages import Place
from tests.elastic.simulated import Simulated
from tests.elastic.small_model import build
from tests.elastic.test_trainer import assert_stands, notes, one_thread, recoveries, run_job

__all__ = ["one_thread"]  # a fixture
LAYERS = 6


def restored(stages: int, path: str) -> Simulated:
    """A job by one process that goes on from a checkpoint."""
    job = Simulated(stages, Passing(12), clip=0.05, layers=LAYERS)
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
