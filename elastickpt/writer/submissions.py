"""What is handed to a writer, and what comes back, whoever the writer is."""

from __future__ import annotations

import socket
from concurrent.futures import Future
from dataclasses import dataclass, field

from elastickpt.commit.cases import Verdict
from elastickpt.commit.contents import outline_digest
from elastickpt.commit.draft import Draft
from elastickpt.commit.marks import mark
from elastickpt.commit.orders import Committed, Order
from elastickpt.errors import CheckpointError, DeadlineExceeded, Refused, from_report, kinds
from elastickpt.format.records import FileDigest
from elastickpt.storage.store import Durability
from elastickpt.writer.arena import Arena
from elastickpt.writer.messages import Done, Failed, OrderFields, Say, Write
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


def submission_of(number: int, staged: StagedRound, arena: Arena | None) -> Submission:
    """A new one; with an order it is marked as being worked on from now on."""
    marked = None if staged.order is None else mark(staged.store, staged.draft.attempt)
    return Submission(number, staged, arena, mark=marked)


@dataclass(slots=True, eq=False)
class Submission:
    """A round on its way. The arena is the writer's until `result` returned or raised; there is none for what was withdrawn.

    With an order, `decided` of the last round, or of the first that failed, is what became of the attempt: the same on all
    ranks, or the error that all of them raise. `said` is this rank's last word on it.
    """

    number: int
    staged: StagedRound
    arena: Arena | None
    future: Future[Outcome] = field(default_factory=Future)
    decided: Future[Committed] = field(default_factory=Future)
    said: FileDigest | CheckpointError | None = None
    mark: socket.socket | None = None  # held as long as somebody may work on the attempt, here or by a writer that has it too
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
        if self.arena is not None:
            self.arena.lent = False
        if self.future.done():
            return
        if isinstance(outcome, Outcome):
            self.written = outcome.nbytes
            self.said = outcome.file
            self.future.set_result(outcome)
        else:
            self.said = outcome
            self.future.set_exception(outcome)

    @property
    def awaits_decision(self) -> bool:
        """Whether its attempt is to be decided, and this rank has had its last word."""
        return self.staged.order is not None and self.said is not None and not self.decided.done()

    def decide(self, verdict: Verdict) -> None:
        """What became of the attempt."""
        self.unmark()
        if self.decided.done():
            return
        if isinstance(verdict, Committed):
            self.decided.set_result(verdict)
        else:
            self.decided.set_exception(from_report(verdict))

    def give_up(self, error: CheckpointError) -> None:
        """Nobody will tell what becomes of it."""
        self.end(error)
        self.unmark()
        if not self.decided.done():
            self.decided.set_exception(error)

    def unmark(self) -> None:
        """Nobody here works on the attempt by this submission any more."""
        if self.mark is not None:
            self.mark.close()
            self.mark = None

    def write(self) -> Write:
        """What its writer is told."""
        staged = self.staged
        if self.arena is None:
            raise Refused("what was withdrawn is not written")
        return Write(
            job=self.number,
            plan=staged.prepared.digest,
            round=staged.round,
            arena=self.arena.number,
            store=staged.store,
            draft=_draft(staged),
            durability=staged.durability,
            template=staged.template,
            known=staged.known,
            order=_order(staged),
            repeated=self.deaths > 0,
        )

    def say(self) -> Say:
        """What a writer is told that only has to pass on this rank's last word."""
        staged, said = self.staged, self.said
        if said is None:
            raise Refused("this rank has not said anything of the attempt")
        words = (said.path, said.nbytes, said.digest) if isinstance(said, FileDigest) else (said.kind, said.message)
        return Say(self.number, staged.store, _draft(staged), staged.durability, _order(staged), words)


def _draft(staged: StagedRound) -> tuple[str, str, str]:
    return staged.draft.name, staged.draft.folder, staged.draft.attempt


def _order(staged: StagedRound) -> OrderFields:
    order = staged.order
    if order is None:
        return ()
    register = "" if order.register is None else str(order.register)
    return register, outline_digest(order.outline) if order.outline else "", order.rest, order.metrics


def outcome_of(done: Done) -> Outcome:
    """What a writer said it wrote."""
    return Outcome(done.nbytes, done.checksums, FileDigest(*done.file) if done.file else None)


def error_of(failed: Failed) -> CheckpointError:
    """The error that a writer met, as it would have been raised here."""
    return kinds().get(failed.kind, CheckpointError)(failed.message)
