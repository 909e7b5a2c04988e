"""What a run tells those who watch it: one value for each save and each restore, and the phases that they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SaveOutcome = Literal["committed", "failed", "skipped"]
Process = Literal["trainer", "writer"]


@dataclass(frozen=True, slots=True)
class SaveEvent:
    """One save of the run, over for good. `nbytes` are those of its arrays, of all ranks.

    On the rank that tells it, in seconds, 0.0 for what was not reached: `stall_s`, how long training stood still; `write_s`,
    from the first byte to the last durable one; `commit_s`, from there until it was acknowledged. `time`, when it ended, in
    seconds since 1970. `kind` and `reason` say why it failed or was skipped, in the words of the error.
    """

    step: int
    epoch: int
    outcome: SaveOutcome
    nbytes: int
    stall_s: float
    write_s: float
    commit_s: float
    time: float
    kind: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RestoreEvent:
    """One restore. `step` is 0 where there was nothing; `skipped`: newer checkpoints that could not be taken."""

    step: int
    epoch: int
    skipped: int
    nbytes: int
    restore_s: float
    time: float


@dataclass(frozen=True, slots=True)
class Phase:
    """What a process of a rank did, from `begin_s` to `end_s` of CLOCK_MONOTONIC of its host; `step` is that of the save."""

    name: str
    rank: int
    process: Process
    begin_s: float
    end_s: float
    step: int | None = None
