"""One save beside training: a `SaveHandle` as its caller has it, and a `SaveTask` as the thread that trains and the one that
works beside it both see it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from elastickpt.commit.attempt import Attempt, Committed, Destination
from elastickpt.errors import CheckpointError, DeadlineExceeded, InternalError
from elastickpt.saving.arenas import ArenaSlot
from elastickpt.saving.drift import Hashed
from elastickpt.saving.pipeline import Pipeline
from elastickpt.saving.request import CheckpointInfo, Request
from elastickpt.saving.save_states import SaveProgress
from elastickpt.saving.staging import Stager
from elastickpt.saving.structures import KnownStructure, Proposal
from elastickpt.training.device import Copies
from elastickpt.writer.share import Share

log = logging.getLogger(__name__)


class SaveHandle:
    """A save under way. Methods may be called from any thread, and as often as one likes.

    It ends on all ranks alike: with a checkpoint, or with one error whose `report` names every rank that failed.

    Examples:
        >>> handle = ek.async_save(state, "out/step-2000", step=2000)
        >>> handle.wait_staged()
        >>> handle.exception() is None
        True
        >>> handle.done(), handle.result().step
        (True, 2000)
        >>> ended = []
        >>> handle.add_done_callback(ended.append)
        >>> ended == [handle]
        True
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._ended: Future[CheckpointInfo] = Future()
        self._wait_staged: Callable[[], None] = _staged_already

    def wait_staged(self) -> None:
        """On return the tensors of the state may change: nothing reads them for this save any more. Blocking only where copies
        from a device go on after the call; `torch.optim` optimizers wait by themselves, captured steps must call this.

        Raises nothing of the save: what becomes of it, `result` says.
        """
        self._wait_staged()

    def result(self, timeout_s: float | None = None) -> CheckpointInfo:
        """The checkpoint, once it is committed. Blocking.

        Args:
            timeout_s: For how many seconds to wait; by default until it has ended.

        Returns:
            The checkpoint.

        Raises:
            Refused: `state` or an argument cannot be accepted; its kinds say which.
            SaveSkipped: No memory was free within the limit on some rank.
            StorageFailed: The store said no.
            WriterLost: A writer process ended before it had written.
            Superseded: Another job has the run.
            RanksFailed: Ranks failed, or are gone. All of these are the same on every rank.
            DeadlineExceeded: It is still under way after `timeout_s`, and goes on.
        """
        error = self.exception(timeout_s)
        if error is not None:
            raise error
        return self._ended.result()

    def done(self) -> bool:
        """Whether the save has ended, one way or the other. Not blocking.

        Returns:
            Whether `result` and `exception` return at once.

        Raises nothing.
        """
        return self._ended.done()

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """The error that `result` raises, once the save has ended. Blocking.

        Args:
            timeout_s: For how many seconds to wait; by default until it has ended.

        Returns:
            The error; None for a checkpoint.

        Raises:
            DeadlineExceeded: It is still under way after `timeout_s`.
        """
        try:
            return self._ended.exception(timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.path}: the save is still under way after {timeout_s:g} s") from None

    def add_done_callback(self, call: Callable[[SaveHandle], object]) -> None:
        """Has a function called once the save has ended, on a thread that does nothing else; at once if it has. Errors are
        logged.

        Args:
            call: Is called with this handle.

        Raises nothing.
        """

        def told(_: object) -> None:
            try:
                call(self)
            except BaseException:  # an exit included: other saves are waiting for this thread
                log.exception("%s: a callback failed", self.path)

        self._ended.add_done_callback(told)

    # -- for whoever carries the save out ------------------------------------------------------------------------------

    def staging(self, wait: Callable[[], None]) -> None:
        """Copies go on until `wait` returns."""
        self._wait_staged = wait

    def end(self, outcome: CheckpointInfo | BaseException) -> None:
        """The save has ended so. The first outcome counts."""
        if self._ended.done():
            return
        if isinstance(outcome, CheckpointInfo):
            self._ended.set_result(outcome)
        else:
            self._ended.set_exception(outcome)

    @property
    def failed(self) -> CheckpointError | None:
        """The error of a save that has ended with one of this library's."""
        error = self._ended.exception(0) if self._ended.done() else None
        return error if isinstance(error, CheckpointError) else None


def _staged_already() -> None:
    return None


@dataclass(slots=True)
class Times:
    """Monotonic seconds, for the report."""

    begun: float
    staged: float = 0.0  # also the end of the stall
    submitted: float = 0.0
    written: float = 0.0


@dataclass(slots=True, eq=False)
class SaveTask:
    """What the training thread leaves: a proposal, or the failure with which this rank takes part; and, if it knew the plan,
    the slot where it has staged by it, or is just doing so. Else it waits for `agreed` and stages then: `staged` runs while
    it copies, and ends when it has."""

    handle: SaveHandle
    destination: Destination
    request: Request
    times: Times
    number: int  # of the saves of this saver, from 1
    progress: SaveProgress = field(default_factory=SaveProgress)
    proposal: Proposal | None = None
    failure: BaseException | None = None
    slot: ArenaSlot | None = None
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


def info_of(task: SaveTask, outcome: Committed, at: float) -> CheckpointInfo:
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
