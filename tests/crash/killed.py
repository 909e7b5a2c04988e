"""What a rank of the tests of this folder does: save, through a store in which one operation kills, stops or fails it."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from simulated import replaced
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import elastickpt as ek
from elastickpt.commit import attempt
from elastickpt.errors import CheckpointError, RankFailure
from elastickpt.ranks.process_group import job_group, team_of
from elastickpt.storage.opening import locate_for_saving
from elastickpt.storage.store import Store
from elastickpt.testing.faults import CallAt, FailAt, Fault, FaultyStore, Mode, Operation, RecordingStore

Happening = Literal["nothing", "kill", "stop", "no space"]
SHAPES = {"w": (8, 3), "b": (5,)}


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens to whom, and when: at the nth storage operation of the victim."""

    path: str
    victim: int = 0
    happening: Happening = "nothing"
    n: int = 0
    mode: Mode = "before"
    silence_s: float = 30.0

    @property
    def marks(self) -> Path:
        """Where each rank leaves a file when its save has ended, and the victim one before it is hit."""
        return Path(self.path + ".marks")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a save ended on one rank: with an error's kind, or with none. `operations` of its store."""

    kind: str | None
    message: str
    report: tuple[RankFailure, ...]
    operations: tuple[str, ...]


def whole(name: str, path: str) -> torch.Tensor:
    """The tensor of this name in the checkpoint for this path; other paths have other values."""
    shape = torch.Size(SHAPES[name])
    return (torch.arange(shape.numel(), dtype=torch.float32) + sum(map(ord, name + Path(path).name))).reshape(shape)


def save_and_tell(rank: int, world_size: int, plan: Plan) -> Ended:
    """Saves two sharded tensors and a replicated value; rank 0 commits."""
    mesh = init_device_mesh("cpu", (world_size,))
    state = {
        "tensors": {name: distribute_tensor(whole(name, plan.path), mesh, [Shard(0)]) for name in SHAPES},
        "note": "equal on all",
    }
    stores: list[RecordingStore] = []

    def locate(path: str) -> tuple[Store, str]:
        store, name = locate_for_saving(path)
        stores.append(RecordingStore(FaultyStore(store, _fault(plan)) if rank == plan.victim else store))
        return stores[-1], name

    team_of(job_group(None), silence_s=plan.silence_s)  # made before the save, which then takes this team
    kind, message, report = None, "", ()
    try:
        with replaced(attempt, "locate_for_saving", locate):
            ek.save(state, plan.path)
    except CheckpointError as error:
        kind, message, report = error.kind, error.message, error.report
    _mark(plan, f"ended-{rank}")
    assert len(stores) == 1, "the save did not open its store here: nothing that was planned can happen to it"
    return Ended(kind, message, report, tuple(o.name for store in stores for o in store.operations))


def _fault(plan: Plan) -> Fault:
    if plan.happening == "no space":
        return FailAt(plan.n, errno.ENOSPC, "torn")

    def strike(operation: Operation) -> None:
        _mark(plan, "hit")
        os.kill(os.getpid(), signal.SIGKILL if plan.happening == "kill" else signal.SIGSTOP)

    return CallAt(plan.n if plan.happening != "nothing" else -1, strike, plan.mode)


def _mark(plan: Plan, name: str) -> None:
    plan.marks.mkdir(exist_ok=True)
    (plan.marks / name).touch()
