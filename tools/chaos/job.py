"""What the ranks of a job do: train and save, over and over; and what a reader does: look at all that is there."""

from __future__ import annotations

import os
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from . import ours as ours  # what readers are forked from has it then; the peers below, where they are installed
from .contents import State, clear, empty_state, fill, held, mixture
from .entrants import Contestant, entrant
from .events import Teller
from .judge import Seen

for _peer in ("peer_dcp", "peer_tc"):
    with suppress(ImportError):
        import_module(f"{__package__}.{_peer}")


MEETING_LIMIT_S = 5.0  # of ranks that train; what survivors of a killed rank have to return is more


@dataclass(frozen=True, slots=True)
class Saves:
    """Which steps a job saves, in which folder, by whom.

    `job`: 0, or 1 for the one that goes on after it; `pipe`: where it tells of it; `log`: the block log, "" without one;
    `pause_s`: what training takes between two saves; `scale`: of the state; `forgiven`: so many failed saves do not end it;
    `meeting_s`: how long a rank waits for the others between two saves.
    """

    contestant: str
    folder: str
    steps: tuple[int, ...]
    pipe: str
    log: str = ""
    job: int = 0
    pause_s: float = 0.0
    scale: int = 1
    forgiven: int = 0
    meeting_s: float = MEETING_LIMIT_S


def train_and_save(rank: int, world_size: int, plan: Saves) -> str:
    """Save each step and tell of it; one error more than is forgiven ends it. The last error is returned, "" without any.

    Where any are forgiven a rank ends with the others, who hear of it when they meet; else at once.
    """
    teller = Teller(Path(plan.pipe), rank, Path(plan.log) if plan.log else None)
    state = _state(rank, world_size, plan.scale)
    contestant = entrant(plan.contestant).make(Path(plan.folder))
    errors: list[str] = []
    step = 0
    try:
        for step in plan.steps:
            if _met(len(errors), plan.meeting_s) > plan.forgiven:
                break
            if error := _saved(contestant, state, step, plan.job, teller):
                errors.append(error)
                if not plan.forgiven:
                    break
            time.sleep(plan.pause_s)
    except BaseException:
        teller.tell("failed", step)
        errors.append(traceback.format_exc(limit=-3))
    finally:
        teller.tell("ended", step)
    return errors[-1] if errors else ""


def look(rank: int, world_size: int, contestant_name: str, folder: str, scale: int) -> tuple[Seen, ...]:
    """Load everything that a user would take for a checkpoint; never raises what a load raises, or finding what to load."""
    state = _state(rank, world_size, scale)
    contestant = entrant(contestant_name).make(Path(folder))
    try:
        places = contestant.places()
    except BaseException as error:
        return (Seen("all", "error", detail=_told(error)),)
    found = []
    for place, said in places:
        clear(state)
        try:
            contestant.load(state, place)
        except BaseException as error:
            found.append(Seen(place, "error", detail=_told(error)))
            continue
        whose = held(state)
        if whose is None:
            found.append(Seen(place, "wrong", detail=mixture(state)))
        elif said not in (None, whose[0]):
            found.append(Seen(place, "wrong", *whose, detail=f"said to be step {said}, holds step {whose[0]}"))
        else:
            found.append(Seen(place, "whole", *whose))
    return tuple(found)


def _met(failed: int, limit_s: float) -> float:
    """All ranks meet, as those of any data-parallel job do at each step; the most saves that have failed on one of them."""
    most = torch.tensor(float(failed))
    meeting = distributed.all_reduce(most, distributed.ReduceOp.MAX, async_op=True)
    assert meeting is not None
    meeting.wait(timedelta(seconds=limit_s))  # gloo does not always notice a peer that was killed between two saves
    return most.item()


def _saved(contestant: Contestant, state: State, step: int, job: int, teller: Teller) -> str:
    """One save, and why it failed."""
    fill(state, step, job)
    teller.tell("begun", step)
    try:
        finish = contestant.save(state, step)
        fill(state, step + 1, job)  # training goes on: nothing of it belongs to this step's checkpoint
        finish()
        teller.tell("acknowledged", step)
    except BaseException:  # a CheckpointException of torch is no Exception
        teller.tell("failed", step)
        return traceback.format_exc(limit=-3)
    finally:
        teller.tell("over", step)
    return ""


def _state(rank: int, world_size: int, scale: int) -> State:
    """Also what torchrun sets, for libraries that ask for it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return empty_state(init_device_mesh("cpu", (world_size,)), scale)


def _told(error: BaseException) -> str:
    """Its type and what it says, of several lines the last one: some errors carry whole tracebacks of others."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"[:300]
