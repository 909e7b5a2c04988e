"""What is handed to a writer, and what comes back, whoever the writer is."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from elastickpt.commit.draft import Draft
from elastickpt.commit.orders import Committed, Order
from elastickpt.errors import CheckpointError, DeadlineExceeded, kinds
from elastickpt.format.records import FileDigest
from elastickpt.storage.store import Durability
from elastickpt.writer.arena import Arena
from elastickpt.writer.messages import Done, Failed, Write
from elastickpt.writer.prepared import Prepared


@dataclass(frozen=True, slots=True, eq=False)
class StagedRound:
    """A round that lies in an arena, and what a writer needs to know beside. See `messages.Write` for the last two."""

    prepared: Prepared
    round: int
    store: str
    draft: Draft
    durability: Durability
    template: bytes
    known: bytes = b""
    order: Order | None = None  # the same in each round: after the last its writer goes on to commit; None: somebody else does


@dataclass(frozen=True, slots=True)
class Outcome:
    """A round that was written: its bytes, and the checksums of its blocks; after the last one `file`, the attestation."""

    nbytes: int
    checksums: bytes
    file: FileDigest | None


@dataclass(slots=True, eq=False)
class Submission:
    """A round on its way. The arena is the writer's until `result` returned or raised.

    With an order, `decided` of the last round, or of the first that failed, is what became of the attempt: the same on all
    ranks, or the error that all of them raise.
    """

    number: int
    staged: StagedRound
    arena: Arena
    future: Future[Outcome] = field(default_factory=Future)
    decided: Future[Committed] = field(default_factory=Future)
    written: int = 0  # bytes so far, roughly
    deaths: int = 0  # of writers that had it
    handed: bool = False  # to the writer of now
    cancelled: bool = False

    def result(self, timeout_s: float | None = None) -> Outcome:
        """Blocks until it is written. Raises what the writer raised, WriterLost, or DeadlineExceeded and goes on."""
        try:
            return self.future.result(timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.staged.draft.folder}: not written within {timeout_s:g} s") from None

    def end(self, outcome: Outcome | CheckpointError) -> None:
        """The last word of its writer, or of whoever gave up on it. The arena is free again, unless it was retired."""
        self.arena.lent = False
        if isinstance(outcome, Outcome):
            self.written = outcome.nbytes
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)

    def write(self) -> Write:
        """What its writer is told."""
        staged = self.staged
        return Write(
            job=self.number,
            plan=staged.prepared.digest,
            round=staged.round,
            arena=self.arena.number,
            store=staged.store,
            draft=(staged.draft.name, staged.draft.folder, staged.draft.attempt),
            durability=staged.durability,
            template=staged.template,
            known=staged.known,
            repeated=self.deaths > 0,
        )


def outcome_of(done: Done) -> Outcome:
    """What a writer said it wrote."""
    return Outcome(done.nbytes, done.checksums, FileDigest(*done.file) if done.file else None)


def error_of(failed: Failed) -> CheckpointError:
    """The error that a writer met, as it would have been raised here."""
    return kinds().get(failed.kind, CheckpointError)(failed.message)
