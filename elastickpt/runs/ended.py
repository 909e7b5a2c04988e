"""A save of a run that has ended, as those who watch it are told of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from elastickpt.errors import CheckpointError, SaveSkipped
from elastickpt.runs.events import Phase, SaveEvent
from elastickpt.saving.request import CheckpointInfo


@dataclass(frozen=True, slots=True)
class Ended:
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
