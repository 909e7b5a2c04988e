"""What a save beside training gives back at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future

from elastickpt.errors import CheckpointError, DeadlineExceeded
from elastickpt.saving.request import CheckpointInfo

log = logging.getLogger(__name__)


class SaveHandle:
    """A save under way. Methods may be called from any thread, and as often as one likes.

    It ends on all ranks alike: with a checkpoint, or with one error whose `report` names every rank that failed.

    Examples:
        >>> handle = ek.async_save(state, "out/step-2000")
        >>> handle.wait_staged()
        >>> handle.exception() is None
        True
        >>> handle.done()
        True
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._ended: Future[CheckpointInfo] = Future()
        self._wait_staged: Callable[[], None] = _staged_already

    def wait_staged(self) -> None:
        """On return the tensors of the state may change: nothing reads them for this save any more. Blocking only where copies
        from a device go on after the call; `torch.optim` optimizers wait by themselves, captured steps must call this.
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
