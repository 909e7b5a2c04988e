"""What a committer does in the storage to end attempts, in a thread of its own, one after the other. [SAVE-80]

Whatever goes wrong ends the attempt too: it is given up. Where that fails as well, it is said of what is open.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from elastickpt.commit.attempt import Attempt, Verdict
from elastickpt.commit.attest import find_attestation
from elastickpt.commit.contents import Contents
from elastickpt.commit.outcome import STANDS, Patience, Standing, commit, give_up, look
from elastickpt.errors import RankFailure
from elastickpt.format.records import FileDigest
from elastickpt.ranks.team import failure_of
from elastickpt.ranks.threads import Worker
from elastickpt.storage.store import Store

log = logging.getLogger(__name__)

Report = tuple[RankFailure, ...]


class CommitThread:
    """Belongs to one thread, which `leave` brings what came of it back to: there `decided` is called. Methods do not block."""

    def __init__(
        self,
        rank: int,
        stores: Callable[[str], Store],
        patience: Patience,
        leave: Callable[[Callable[[], None]], None],
        decided: Callable[[str, Verdict], None],
    ) -> None:
        self._rank, self._stores, self._patience = rank, stores, patience
        self._leave, self._decided = leave, decided
        self._worker = Worker("elastickpt-commit")
        self._count = 0

    @property
    def at_work(self) -> bool:
        """Whether something was begun that has not ended."""
        return self._count > 0

    def commit(self, attempt: Attempt, contents: Callable[[], Contents | None], files: tuple[FileDigest, ...]) -> None:
        """All have attested: it is committed, or found so."""

        def act(store: Store) -> None:
            verdict: Verdict
            try:
                verdict = commit(store, attempt, contents(), files, patience=self._patience)
            except STANDS as error:
                verdict = self._report(error)
            self._tell(attempt, verdict)

        self._do(attempt, act)

    def give_up(self, attempt: Attempt, report: Report) -> None:
        """It is aborted, or found committed."""
        self._do(attempt, lambda store: self._abort(store, attempt, report))

    def find_out(self, attempt: Attempt, report: Report) -> None:
        """It is looked whether it has ended; `report` is said of it if it was aborted."""

        def act(store: Store) -> None:
            if look(store, attempt) is not Standing.OPEN:
                self._abort(store, attempt, report)

        self._do(attempt, act)

    def look_for(
        self, attempt: Attempt, members: tuple[int, ...], found: Callable[[Mapping[int, FileDigest | None]], None]
    ) -> None:
        """`found` is told which of these members have attested in the draft."""

        def act(store: Store) -> None:
            files = {member: find_attestation(store, attempt, member) for member in members}
            self._leave(lambda: found(files))

        self._do(attempt, act)

    def stop(self) -> None:
        """Ends behind what was begun."""
        self._worker.stop()

    def _do(self, attempt: Attempt, act: Callable[[Store], None]) -> None:
        def done() -> None:
            self._count -= 1

        def work() -> None:
            try:
                store = self._stores(attempt.store)
                try:
                    act(store)
                except Exception as error:
                    self._abort(store, attempt, self._report(error))
            except Exception as error:  # nothing can be done there
                self._tell(attempt, self._report(error))
            finally:
                self._leave(done)

        self._count += 1
        self._worker.put(work)

    def _abort(self, store: Store, attempt: Attempt, report: Report) -> None:
        verdict: Verdict
        try:
            verdict = give_up(store, attempt, report, patience=self._patience)
        except Exception as error:  # it is open still, unless it is committed: all are told what is known
            more = self._report(error)
            verdict = more if isinstance(error, STANDS) else tuple(dict.fromkeys((*report, *more)))
            log.warning("%s: %s", attempt.where, error)
        self._tell(attempt, verdict)

    def _tell(self, attempt: Attempt, verdict: Verdict) -> None:
        self._leave(lambda: self._decided(attempt.id, verdict))

    def _report(self, error: Exception) -> Report:
        return (failure_of(error, self._rank),)
