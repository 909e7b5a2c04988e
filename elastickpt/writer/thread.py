"""A writer that is a thread of the trainer: for stores that only this process reaches, and where no process may be started.

It shares the interpreter with training, and ends with it: nothing is finished afterwards.
"""

from __future__ import annotations

import socket
import threading

from elastickpt.commit.attempt import Attempt, Verdict
from elastickpt.commit.links import ALONE, Seat, say_farewell
from elastickpt.errors import Cancelled, CheckpointError, InternalError, Refused, WriterLost
from elastickpt.ranks.team import failure_of
from elastickpt.ranks.threads import WorkerThread
from elastickpt.storage.store import Store
from elastickpt.writer.arena import Arena
from elastickpt.writer.attempt_worker import AttemptWorker, perform
from elastickpt.writer.messages import JobFailed, PortionDone
from elastickpt.writer.submissions import StagedPortion, Submission, error_of, outcome_of, submission_of, withdrawal_of
from elastickpt.writer.write_files import WatchBytes


class ThreadWriter:
    """The same methods as `Supervisor`, for one store."""

    def __init__(self, store: Store, *, seat: Seat = ALONE, listener: socket.socket | None = None) -> None:
        self._store = store
        self._worker = WorkerThread("elastickpt-writer")
        self._seat, self._listener = seat, listener
        self._part: AttemptWorker | None = None
        self._ordered: dict[str, Submission] = {}  # by attempt: the newest of those that are not decided
        self._count = 0
        self._closed = self._leaves = False
        self._taking_part = threading.Lock()

    def submit(self, staged: StagedPortion, arena: Arena) -> Submission:
        """Has the portion written from the arena. Raises Refused after `close`, and for an arena that is not free."""
        self._require_open()
        arena.require_free()
        self._count += 1
        submission = submission_of(self._count, staged, arena, self._seat)
        if submission.takes_part:
            self._begin(submission)
        arena.lent = True
        self._worker.put(lambda: self._perform(submission, arena))
        return submission

    def withdraw(self, attempt: Attempt, failure: CheckpointError) -> Submission:
        """This rank takes no part in the attempt after all, which ends it on all ranks; `decided` tells. Raises Refused after
        `close`."""
        self._require_open()
        self._count += 1
        submission = withdrawal_of(self._count, attempt, failure, self._seat)
        part = self._begin(submission)
        part.repeat(submission.say())
        return submission

    def cancel(self, submission: Submission) -> None:
        """Ends it as soon as may be; its result says which came first."""
        submission.cancelled = True

    def settle(self, attempt: Attempt, why: CheckpointError) -> None:
        """Its team is gone: the attempt is found committed, or aborted."""
        if self._part is not None:
            self._part.settle(attempt.id, why.kind, why.message)

    def leave_seat(self) -> None:
        """Its team is broken: once all that it has is decided, it says farewell to the others. Blocking for moments."""
        self._leaves = True
        self._leave_if_idle()

    def forget(self, arena: Arena) -> None:
        """Nothing is kept of an arena."""

    def close(self, *, limit_s: float = 10.0) -> None:
        """Takes nothing more, and waits at most `limit_s` until all is decided; then results still open raise WriterLost, and
        portions are written to their end as long as this process lives. Blocking."""
        if self._closed:
            return
        self._closed = True
        self._worker.stop()
        if self._part is not None:
            self._part.join(limit_s)
            self._part.close()
        elif self._listener is not None:
            self._listener.close()
        while self._ordered:
            _, submission = self._ordered.popitem()
            if submission.arena is not None and not submission.future.done():
                submission.arena.retire()
            submission.give_up(WriterLost(f"{submission.attempt.draft.folder}: not decided when its writer was closed"))

    @property
    def closed(self) -> bool:
        """Whether it takes nothing more."""
        return self._closed

    def _require_open(self) -> None:
        if self._closed:
            raise Refused("this writer was closed")

    def _begin(self, submission: Submission) -> AttemptWorker:
        with self._taking_part:
            if self._part is None:
                self._part = AttemptWorker(self._seat, self._listener, lambda _: self._store, self._tell)
        earlier = self._ordered.get(submission.attempt.id)
        self._ordered[submission.attempt.id] = submission
        if earlier is not None:
            earlier.unmark()
        self._part.begin(submission.enroll(), submission.structure)
        return self._part

    def _tell(self, job: int, verdict: Verdict) -> None:
        submission = next((one for one in list(self._ordered.values()) if one.number == job), None)
        if submission is not None and self._ordered.pop(submission.attempt.id, None) is submission:
            submission.decide(verdict)
        self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        with self._taking_part:
            if not self._leaves or self._ordered:
                return
            part, listener = self._part, self._listener
            self._part, self._listener, self._leaves = None, None, False
        if part is not None:
            part.leave()
        else:
            say_farewell(self._seat)
            if listener is not None:
                listener.close()

    def _perform(self, submission: Submission, arena: Arena) -> None:
        def watch(nbytes: int) -> None:
            if submission.cancelled:
                raise Cancelled("cancelled")
            submission.written += nbytes

        try:
            done = self._carry_out(submission, arena, watch)
        except BaseException as error:
            failure = failure_of(error, 0)
            submission.end(error_of(JobFailed(submission.number, failure.kind, failure.message)))
        else:
            submission.end(outcome_of(done))

    def _carry_out(self, submission: Submission, arena: Arena, watch: WatchBytes) -> PortionDone:
        structure, write = submission.structure, submission.write()
        if structure is None:
            raise InternalError("what was withdrawn is not written")
        if self._part is not None and submission.takes_part:
            return self._part.carry_out(write, structure, arena, watch=watch)
        watch(0)
        return perform(self._store, write, structure, arena, watch=watch)
