"""What a run tells those who watch it: one value for each save and each restore, the phases that they are made of, and how a
save has ended.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from elastickpt.errors import CheckpointError, SaveSkipped
from elastickpt.saving.request import CheckpointInfo

SaveOutcome = Literal["committed", "failed", "skipped"]
ProcessKind = Literal["trainer", "writer"]


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
    process: ProcessKind
    begin_s: float
    end_s: float
    step: int | None = None


@dataclass(frozen=True, slots=True)
class EndedSave:
    """One save, begun in `epoch`: its checkpoint, or its error; when it began, was staged and ended, in monotonic seconds."""

    step: int
    epoch: int
    info: CheckpointInfo | None
    error: BaseException | None
    begun: float
    staged: float
    ended: float

    def event(self) -> SaveEvent:
        """Its event, told now."""
        info, error = self.info, self.error
        return SaveEvent(
            step=self.step,
            epoch=self.epoch,
            outcome="committed" if info else "skipped" if isinstance(error, SaveSkipped) else "failed",
            nbytes=info.nbytes if info else 0,
            stall_s=self.staged - self.begun,
            write_s=info.write_s if info else 0.0,
            commit_s=info.commit_s if info else 0.0,
            time=time.time(),
            kind=error.kind if isinstance(error, CheckpointError) else "",
            reason="" if error is None else str(error),
        )

    def phases(self, rank: int) -> list[Phase]:
        """What this rank and its writer did for it."""
        phases = [Phase("stage", rank, "trainer", self.begun, self.staged, self.step)]
        if (info := self.info) is not None:
            durable = self.ended - info.commit_s
            phases += [
                Phase("agree", rank, "trainer", self.staged, self.staged + info.plan_s, self.step),
                Phase("write", rank, "writer", durable - info.write_s, durable, self.step),
                Phase("commit", rank, "writer", durable, self.ended, self.step),
            ]
        return phases
