"""What is handed to a writer, and what comes back, whoever the writer is."""

from __future__ import annotations

import socket
from concurrent.futures import Future
from dataclasses import dataclass, field

from elastickpt.commit.attempt import Attempt, Committed, Verdict
from elastickpt.commit.draft import mark
from elastickpt.commit.links import ALONE, Seat
from elastickpt.errors import CheckpointError, DeadlineExceeded, fault, from_report, kinds
from elastickpt.format.records import FileDigest
from elastickpt.writer.arena import Arena
from elastickpt.writer.arena_plan import WriterStructure
from elastickpt.writer.messages import Enroll, JobFailed, PortionDone, Say, Settle, Write
from elastickpt.writer.share import Share, Written


@dataclass(frozen=True, slots=True, eq=False)
class StagedPortion:
    """A portion of a rank's share that lies in an arena, or is being staged there. `known`: the checksums of all earlier
    ones."""

    share: Share
    number: int
    earlier: bytes = b""


def submission_of(number: int, staged: StagedPortion, arena: Arena, seat: Seat) -> Submission:
    """A new one; its attempt is marked as being worked on from now on, if its writer takes part in the decision."""
    submission = Submission(number, staged.share.attempt, staged, arena, seat)
    if submission.takes_part:
        submission.mark = mark(submission.attempt.store, submission.attempt.id)
    return submission


def withdrawal_of(number: int, attempt: Attempt, failure: CheckpointError, seat: Seat) -> Submission:
    """This rank takes no part in the attempt after all, and says so."""
    submission = Submission(number, attempt, None, None, seat, mark=mark(attempt.store, attempt.id))
    submission.end(failure)
    return submission


@dataclass(slots=True, eq=False)
class Submission:
    """A portion on its way to a writer that has a seat for it. The arena is the writer's until `result` returned or raised;
    what was withdrawn has none, nor a portion.

    Of a writer that takes part in the decision, `decided` of the last portion, or of the first that failed, is what became of
    the attempt: the same on all ranks, or the error that all of them raise. `said` is this rank's last word on it.
    """

    number: int
    attempt: Attempt
    staged: StagedPortion | None
    arena: Arena | None
    seat: Seat = ALONE
    future: Future[Written] = field(default_factory=Future)
    decided: Future[Committed] = field(default_factory=Future)
    said: FileDigest | CheckpointError | None = None
    mark: socket.socket | None = None  # held as long as somebody may work on the attempt, here or by a writer that has it too
    written: int = 0  # bytes so far, roughly
    deaths: int = 0  # of writers that had it
    handed: bool = False  # to the writer of now
    cancelled: bool = False
    settling: CheckpointError | None = None  # nobody is waited for any more: why the attempt is aborted, if it is

    def result(self, timeout_s: float | None = None) -> Written:
        """Blocks until it is written. Raises what the writer raised, WriterLost, or DeadlineExceeded and goes on."""
        try:
            return self.future.result(timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.attempt.draft.folder}: not written within {timeout_s:g} s") from None

    def end(self, outcome: Written | CheckpointError) -> None:
        """The last word of its writer, or of whoever gave up on it. The arena is free again, unless it was retired."""
        if self.arena is not None:
            self.arena.lent = False
        if self.future.done():
            return
        if isinstance(outcome, Written):
            self.written = outcome.nbytes
            self.said = outcome.file
            self.future.set_result(outcome)
        else:
            self.said = outcome
            self.future.set_exception(outcome)

    @property
    def takes_part(self) -> bool:
        """Whether its writer has a part in the decision of the attempt: at least that it failed."""
        return self.staged is None or self.staged.share.replicated is not None

    @property
    def awaits_decision(self) -> bool:
        """Whether its attempt is to be decided, and this rank has had its last word."""
        return self.takes_part and self.said is not None and not self.decided.done()

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

    @property
    def structure(self) -> WriterStructure | None:
        """What its writer has to know of the structure."""
        return None if self.staged is None else self.staged.share.structure

    def enroll(self) -> Enroll:
        """What a writer is told first that takes part."""
        if self.staged is None or self.staged.share.structure.outline is None:
            return Enroll(self.number, self.attempt, "", b"")
        share = self.staged.share
        return Enroll(self.number, self.attempt, share.structure.digest, share.encoded_values)

    def write(self) -> Write:
        """What its writer is told."""
        staged, arena = self.staged, self.arena
        if staged is None or arena is None:
            raise fault("what was withdrawn was to be written")
        return Write(
            job=self.number,
            attempt=self.attempt,
            structure=staged.share.structure.digest,
            portion=staged.number,
            arena=arena.number,
            member=staged.share.member,
            beside=staged.share.beside,
            earlier=staged.earlier,
            repeated=self.deaths > 0,
        )

    def settle(self) -> Settle:
        """What a writer is told whose team is gone."""
        why = self.settling
        if why is None:
            raise fault("an attempt was to be settled for no reason")
        return Settle(self.attempt.id, why.kind, why.message)

    def say(self) -> Say:
        """What a writer is told that only has to pass on this rank's last word."""
        said = self.said
        if said is None:
            raise fault("a writer was to repeat what this rank has not said of the attempt")
        if isinstance(said, FileDigest):
            return Say(self.number, self.attempt.id, said, None)
        return Say(self.number, self.attempt.id, None, (said.kind, said.message))


def outcome_of(done: PortionDone) -> Written:
    """What a writer said it wrote."""
    return Written(done.nbytes, done.checksums, done.file)


def done_of(job: int, written: Written) -> PortionDone:
    """As a writer says it."""
    return PortionDone(job, written.nbytes, written.checksums, written.file)


def error_of(failed: JobFailed) -> CheckpointError:
    """The error that a writer met, as it would have been raised here."""
    return kinds().get(failed.kind, CheckpointError)(failed.message)
