"""One save beside training, as the thread that trains and the one that works beside it both see it."""

from __future__ import annotations

from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from elastickpt.commit.draft import Draft
from elastickpt.commit.orders import Order
from elastickpt.saving.arenas import Slot
from elastickpt.saving.destination import Destination
from elastickpt.saving.drift import Hashed
from elastickpt.saving.handle import SaveHandle
from elastickpt.saving.plans import Known
from elastickpt.saving.propose import Proposal
from elastickpt.saving.request import Request
from elastickpt.storage.store import Durability
from elastickpt.training.gates import Copies
from elastickpt.writer.submissions import StagedRound


@dataclass(slots=True)
class Times:
    """Monotonic seconds, for the report."""

    begun: float
    staged: float = 0.0  # also the end of the stall
    submitted: float = 0.0
    written: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Ordered:
    """An attempt that exists, with all that a writer needs to write and commit this rank's part."""

    known: Known
    store: str
    draft: Draft
    durability: Durability
    template: bytes
    order: Order
    path: str
    notes: tuple[str, ...]

    def round(self, number: int, checksums: bytes) -> StagedRound:
        """Round `number`, after rounds with these checksums."""
        prepared = self.known.prepared
        return StagedRound(prepared, number, self.store, self.draft, self.durability, self.template, checksums, self.order)


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
    proposal: Proposal | None = None
    failure: Exception | None = None
    slot: Slot | None = None
    known: Known | None = None  # staged by it, or being staged
    hashed: Hashed | None = None  # before that: what is compared with other ranks
    marked: bool = False  # its destination is taken
    copies: Copies | None = None
    agreed: Future[Known] = field(default_factory=Future)
    staged: Future[None] = field(default_factory=Future)
    ordered: Future[Ordered] = field(default_factory=Future)  # for who stages in rounds, and so submits by himself

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
        waited_for: tuple[Future[Any], ...] = (self.agreed, self.ordered)
        for future in waited_for:
            if not future.done():
                future.set_exception(error)
