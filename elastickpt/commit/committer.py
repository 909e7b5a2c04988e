"""What the committer of an attempt knows of its writers, what it does next, and what it does in the storage. [SAVE-80..83]

    writers                                                    next
    one failed, or was lost                                    GiveUp with all failures known
    all attested                                               CommitNow with their attestations
    some missing for longer than `missing_s`                   LookFor their attestations in the draft
    else                                                       KeepWaiting

1. A writer's first attestation or failure is its last word: it may be revived, and say it again.
2. Missing is who is not connected: from the beginning of the tally, from the loss of its connection, or, if it was passed over
   as a committer, at once.
3. An attestation is a file, so it holds whether its writer lives or not: a missing writer's is looked for where it would be. If
   it is not there the writer is lost.

In the storage it works in a thread of its own, on one attempt after the other. Whatever goes wrong ends the attempt too: it is
given up. Where that fails as well, it is said of what is open.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import inf

from elastickpt.commit.attempt import Attempt, Verdict
from elastickpt.commit.attest import DraftContents, find_attestation
from elastickpt.commit.outcome import STANDS, AttemptStanding, Patience, commit, give_up, look
from elastickpt.errors import RankFailure, RankLost
from elastickpt.format.records import FileDigest
from elastickpt.ranks.team import failure_of
from elastickpt.ranks.threads import WorkerThread
from elastickpt.storage.store import Store


@dataclass(frozen=True, slots=True)
class KeepWaiting:
    pass


@dataclass(frozen=True, slots=True)
class LookFor:
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CommitNow:
    files: tuple[FileDigest, ...]  # by member


@dataclass(frozen=True, slots=True)
class GiveUp:
    report: tuple[RankFailure, ...]


NextAct = KeepWaiting | LookFor | CommitNow | GiveUp


class Tally:
    """One attempt. `ranks` are the job's, by member; times are monotonic seconds."""

    def __init__(self, ranks: tuple[int, ...], *, now: float) -> None:
        self._ranks = ranks
        self._files: dict[int, FileDigest] = {}
        self._failures: dict[int, RankFailure] = {}
        self._missing_since: dict[int, float] = dict.fromkeys(range(len(ranks)), now)

    def present(self, member: int) -> None:
        """It is connected, or this process itself."""
        self._missing_since.pop(member, None)

    def lost(self, member: int, *, now: float) -> None:
        """Its connection is gone."""
        self._missing_since.setdefault(member, now)

    def passed_over(self, members: Collection[int]) -> None:
        """Candidates that could not be reached by this process: nothing is expected of them."""
        for member in members:
            if member in self._missing_since:
                self._missing_since[member] = -inf

    def said(self, member: int, what: FileDigest | RankFailure) -> None:
        """Its last word, unless it had one."""
        if member in self._files or member in self._failures:
            return
        if isinstance(what, FileDigest):
            self._files[member] = what
        else:
            self._failures[member] = what

    def not_found(self, member: int) -> None:
        """It was missing, and the draft did not hold its attestation: it is lost, unless it has come meanwhile."""
        if member not in self._missing_since:
            return
        rank = self._ranks[member]
        self.said(member, RankFailure(rank, RankLost.kind, "its writer is gone, and had not attested"))

    def next(self, *, now: float, missing_s: float) -> NextAct:
        if self._failures:
            return GiveUp(tuple(sorted(self._failures.values())))
        open_members = [member for member in range(len(self._ranks)) if member not in self._files]
        if not open_members:
            return CommitNow(tuple(self._files[member] for member in range(len(self._ranks))))
        missing = [m for m in open_members if m in self._missing_since and now - self._missing_since[m] >= missing_s]
        return LookFor(tuple(missing)) if missing else KeepWaiting()


log = logging.getLogger(__name__)

RankFailures = tuple[RankFailure, ...]


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
        self._worker = WorkerThread("elastickpt-commit")
        self._count = 0

    @property
    def at_work(self) -> bool:
        """Whether something was begun that has not ended."""
        return self._count > 0

    def commit(self, attempt: Attempt, contents: Callable[[], DraftContents | None], files: tuple[FileDigest, ...]) -> None:
        """All have attested: it is committed, or found so."""

        def act(store: Store) -> None:
            verdict: Verdict
            try:
                verdict = commit(store, attempt, contents(), files, patience=self._patience)
            except STANDS as error:
                verdict = self._report(error)
            self._tell(attempt, verdict)

        self._do(attempt, act)

    def give_up(self, attempt: Attempt, report: RankFailures) -> None:
        """It is aborted, or found committed."""
        self._do(attempt, lambda store: self._abort(store, attempt, report))

    def find_out(self, attempt: Attempt, report: RankFailures) -> None:
        """It is looked whether it has ended; `report` is said of it if it was aborted."""

        def act(store: Store) -> None:
            if look(store, attempt) is not AttemptStanding.OPEN:
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

    def _abort(self, store: Store, attempt: Attempt, report: RankFailures) -> None:
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

    def _report(self, error: Exception) -> RankFailures:
        return (failure_of(error, self._rank),)
