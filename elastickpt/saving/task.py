"""One save beside training, as the thread that trains and the one that works beside it both see it."""

from __future__ import annotations

import logging
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from elastickpt.commit.attempt import Attempt, Committed
from elastickpt.commit.destination import Destination
from elastickpt.errors import InternalError
from elastickpt.saving.arenas import Slot
from elastickpt.saving.drift import Hashed
from elastickpt.saving.handle import SaveHandle
from elastickpt.saving.pipeline import Pipeline
from elastickpt.saving.request import CheckpointInfo, Request
from elastickpt.saving.save_states import Progress
from elastickpt.saving.staging import Stager
from elastickpt.saving.structures import KnownStructure, Proposal
from elastickpt.training.device import Copies
from elastickpt.writer.share import Share

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Times:
    """Monotonic seconds, for the report."""

    begun: float
    staged: float = 0.0  # also the end of the stall
    submitted: float = 0.0
    written: float = 0.0


@dataclass(slots=True, eq=False)
class Task:
    """What the training thread leaves: a proposal, or the failure with which this rank takes part; and, if it knew the plan,
    the slot where it has staged by it, or is just doing so. Else it waits for `agreed` and stages then: `staged` runs while
    it copies, and ends when it has."""

    handle: SaveHandle
    destination: Destination
    request: Request
    times: Times
    number: int  # of the saves of this saver, from 1
    progress: Progress = field(default_factory=Progress)
    proposal: Proposal | None = None
    failure: BaseException | None = None
    slot: Slot | None = None
    stages_by: KnownStructure | None = None  # staged by it, or being staged
    hashed: Hashed | None = None  # before that: what is compared with other ranks
    marked: bool = False  # its destination is taken
    copies: Copies | None = None
    pipeline: Pipeline | None = None  # once the ranks talk about it
    agreed: Future[Stager] = field(default_factory=Future)  # what it is to stage by
    staged: Future[None] = field(default_factory=Future)
    open: Future[Share] = field(default_factory=Future)  # for who stages in portions, and so submits by himself

    @property
    def attempt(self) -> Attempt | None:
        """Once it is open."""
        opened = getattr(self.pipeline, "opened", None)
        return None if opened is None else opened.attempt

    def give_up_slot(self) -> None:
        """Its arena is free again, once no copies into it are on their way. Blocking until then."""
        slot, self.slot = self.slot, None
        if slot is not None:
            try:
                if self.staged.running():
                    wait((self.staged,))
                if self.copies is not None:
                    self.copies.wait()
            finally:
                slot.release()

    def interrupt(self, error: Exception) -> None:
        """The thread that trains copies no further."""
        if self.staged.running():
            self.staged.set_exception(error)

    def fail(self, error: BaseException) -> None:
        """Whoever waits for this save waits no longer."""
        waited_for: tuple[Future[Any], ...] = (self.agreed, self.open)
        for future in waited_for:
            if not future.done():
                future.set_exception(error)


def info_of(task: Task, outcome: Committed, at: float) -> CheckpointInfo:
    """Its one line in the log, and what its handle returns; `at` is when it was known to be committed."""
    times, pipeline = task.times, task.pipeline
    if pipeline is None:
        raise InternalError("a save was committed of which no rank was asked")
    submitted, written = times.submitted or times.staged, times.written or at
    stall = times.staged - times.begun
    log.log(
        logging.INFO if pipeline.team.member == 0 else logging.DEBUG,  # which says it for all
        "saved %s: %d arrays, %.3f GB; staged in %.3f s, written at %.2f s, committed at %.2f s (%.2f GB/s), stall %.3f s",
        *(pipeline.path, outcome.arrays, outcome.nbytes / 1e9),
        *(stall, written - times.begun, at - times.begun, outcome.nbytes / 1e9 / max(at - times.begun, 1e-9), stall),
    )
    return CheckpointInfo(
        path=pipeline.path,
        step=task.request.step,
        attempt=pipeline.opened.attempt.id,
        nbytes=outcome.nbytes,
        arrays=outcome.arrays,
        plan_s=max(0.0, submitted - times.staged),
        write_s=max(0.0, written - submitted),
        commit_s=max(0.0, at - written),
        stall_s=stall,
        notes=pipeline.notes,
    )
