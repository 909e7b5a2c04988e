"""What a run does beside training, on rank 0, in a thread of its own: retention, sweeping, the link for people, metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping

from elastickpt.errors import CheckpointError, NotACheckpoint, Superseded
from elastickpt.ledger.branch import at_step, entries_of, point_latest
from elastickpt.ledger.epochs import Holding
from elastickpt.ledger.history import is_claimed_by
from elastickpt.ledger.metrics import add_metrics
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.removal import remove_commits, sweep
from elastickpt.ledger.retention import Keep, judge, removable
from elastickpt.ledger.stored import read_view
from elastickpt.ranks.threads import WorkerThread
from elastickpt.storage.store import Store

log = logging.getLogger(__name__)


class _EpochsOwn(Collection[AttemptId]):
    """The attempts of an epoch, whichever there will be: they may be under way."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def __contains__(self, attempt: object) -> bool:
        return isinstance(attempt, AttemptId) and attempt.epoch == self._epoch

    def __iter__(self) -> Iterator[AttemptId]:
        return iter(())

    def __len__(self) -> int:
        return 0


class Upkeep:
    """Methods do not block but for `close`; what goes wrong is logged, and costs training nothing."""

    def __init__(self, store: Store, keep: Keep) -> None:
        self._store, self._keep = store, keep
        self._holding: Holding | None = None
        self._tokens: tuple[str, ...] = ()
        self._verified: dict[AttemptId, bool] = {}
        self._waiting = False  # folders with a manifest and no register that counts, until the live branch has passed them
        self._worker = WorkerThread("elastickpt-upkeep")

    def claiming(self, token: str) -> None:
        """This job claims the run with this token next: what that supersedes of its own is no news."""
        self._tokens = (*self._tokens, token)

    def started(self, holding: Holding, *, verified: Mapping[AttemptId, bool]) -> None:
        """A new epoch of this job: dead attempts of older ones go, and what was found about checkpoints is remembered."""

        def work() -> None:
            self._holding = holding
            self._verified |= verified
            self._sweep(holding)
            self._retain(holding)

        self._put(work)

    def committed(self) -> None:
        """There is a new commit: what is not to be kept any more goes."""

        def work() -> None:
            if self._waiting and self._holding is not None:
                self._sweep(self._holding)
            self._retain(self._holding)

        self._put(work)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """The checkpoint of this step has these metrics from now on."""

        def work() -> None:
            holding = self._holding
            if holding is None:
                raise NotACheckpoint(f"{self._store.url}: no epoch was started")
            entry = at_step(entries_of(complete(read_view(self._store))), step=step)
            try:
                complete(add_metrics(self._store, holding, attempt=entry.id, metrics=metrics))
            except Superseded:
                if not self._is_rolling_back():
                    raise
                log.warning("%s: a rollback came before the metrics of step %d were added", self._store.url, step)
                return
            self._retain(holding)

        self._put(work)

    def call(self, tell: Callable[[], None]) -> None:
        """Calls this here, and logs what it raises."""
        self._put(tell)

    def close(self, *, limit_s: float) -> None:
        """What was begun is done, at most within the limit. Blocking."""
        self._worker.stop()
        self._worker.join(limit_s)

    def _put(self, work: Callable[[], None]) -> None:
        self._worker.put(lambda: self._carry_out(work))

    def _carry_out(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Superseded as error:
            if not self._is_rolling_back():
                log.warning("%s", error)
        except CheckpointError as error:
            log.warning("%s: %s", self._store.url, error)
        except Exception:
            log.exception("%s: upkeep of the run met a fault", self._store.url)

    def _is_rolling_back(self) -> bool:
        """Whether it was this job's own claim that superseded its work."""
        try:
            return complete(is_claimed_by(self._store, self._tokens))
        except CheckpointError:
            return False

    def _sweep(self, holding: Holding) -> None:
        swept = complete(sweep(self._store, holding, in_flight=_EpochsOwn(holding.epoch)))
        self._waiting = bool(swept.waiting)
        for attempt, why in swept.left:
            log.warning("%s/%s: left: %s", self._store.url, attempt.folder, why)
        for attempt in swept.passed:  # [RUN-104]
            log.warning(
                "%s/%s: removed, though it had a manifest: no register that counts named it, and the live branch has a commit "
                "at its step or a later one",
                self._store.url,
                attempt.folder,
            )

    def _retain(self, holding: Holding | None) -> None:
        if holding is None:
            return
        entries = entries_of(complete(read_view(self._store)))
        going = removable(judge(self._keep, entries, now=time.time(), verified=self._verified))
        complete(point_latest(self._store))
        if going:
            complete(remove_commits(self._store, holding, commits=going))
            log.info("%s: removed %s", self._store.url, ", ".join(f"step {one.step}" for one in going))
