"""A writer that is a thread of the trainer: for stores that only this process reaches, and where no process may be started.

It shares the interpreter with training, and ends with it: nothing is finished afterwards.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from elastickpt.comms.team import failure_of
from elastickpt.errors import CheckpointError, Refused
from elastickpt.storage.store import Store
from elastickpt.writer.arena import Arena
from elastickpt.writer.jobs import perform
from elastickpt.writer.messages import Failed
from elastickpt.writer.submissions import StagedRound, Submission, error_of, outcome_of


class ThreadWriter:
    """The same methods as `Supervisor`, for one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="elastickpt-writer")
        self._count = 0
        self._closed = False

    def submit(self, staged: StagedRound, arena: Arena) -> Submission:
        """Has the round written from the arena. Raises Refused after `close`, and for an arena that is not free."""
        if self._closed:
            raise Refused("this writer was closed")
        arena.require_free()
        self._count += 1
        submission = Submission(self._count, staged, arena)
        arena.lent = True
        self._pool.submit(self._perform, submission)
        return submission

    def cancel(self, submission: Submission) -> None:
        """Ends it as soon as may be; its result says which came first."""
        submission.cancelled = True

    def forget(self, arena: Arena) -> None:
        """Nothing is kept of an arena."""

    def close(self, *, limit_s: float = 10.0) -> None:
        """Takes nothing more; what was submitted is finished as long as this process lives. Does not wait."""
        self._closed = True
        self._pool.shutdown(wait=False)

    def _perform(self, submission: Submission) -> None:
        def watch(nbytes: int) -> None:
            if submission.cancelled:
                raise CheckpointError("cancelled")
            submission.written += nbytes

        try:
            watch(0)
            staged = submission.staged
            done = perform(self._store, submission.write(), staged.prepared, submission.arena.memory, watch=watch)
        except BaseException as error:
            failure = failure_of(error, 0)
            submission.end(error_of(Failed(submission.number, failure.kind, failure.message)))
        else:
            submission.end(outcome_of(done))
