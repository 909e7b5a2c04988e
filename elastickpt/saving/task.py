"""One save beside training, as the thread that trains and the one that works beside it both see it."""

from __future__ import annotations

from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.destination import Destination
from elastickpt.saving.arenas import Slot
from elastickpt.saving.drift import Hashed
from elastickpt.saving.handle import SaveHandle
from elastickpt.saving.pipeline import Pipeline
from elastickpt.saving.propose import Proposal
from elastickpt.saving.request import Request
from elastickpt.saving.save_states import Progress
from elastickpt.saving.staging import Stager
from elastickpt.saving.structures import KnownStructure
from elastickpt.training.gates import Copies
from elastickpt.writer.share import Share


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
    known: KnownStructure | None = None  # staged by it, or being staged
    hashed: Hashed | None = None  # before that: what is compared with other ranks
    marked: bool = False  # its destination is taken
    copies: Copies | None = None
    pipeline: Pipeline | None = None  # once the ranks talk about it
    agreed: Future[Stager] = field(default_factory=Future)  # what it is to stage by
    staged: Future[None] = field(default_factory=Future)
    open: Future[Share] = field(default_factory=Future)  # for who stages in rounds, and so submits by himself

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
