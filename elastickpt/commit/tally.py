"""What the committer of an attempt knows of its writers, and what it does next; clocks are given. [SAVE-81..83]

    writers                                                    next
    one failed, or was lost                                    Abort with all failures known
    all attested                                               Finish with their attestations
    some missing for longer than `missing_s`                   LookFor their attestations in the draft
    else                                                       Wait

1. A writer's first attestation or failure is its last word: it may be revived, and say it again.
2. Missing is who is not connected: from the beginning of the tally, from the loss of its connection, or, if it was passed over
   as a committer, at once.
3. An attestation is a file, so it holds whether its writer lives or not: a missing writer's is looked for where it would be. If
   it is not there the writer is lost.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import inf

from elastickpt.errors import RankFailure, RankLost
from elastickpt.format.records import FileDigest


@dataclass(frozen=True, slots=True)
class Wait:
    pass


@dataclass(frozen=True, slots=True)
class LookFor:
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    files: tuple[FileDigest, ...]  # by member


@dataclass(frozen=True, slots=True)
class Abort:
    report: tuple[RankFailure, ...]


Next = Wait | LookFor | Finish | Abort


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

    def next(self, *, now: float, missing_s: float) -> Next:
        if self._failures:
            return Abort(tuple(sorted(self._failures.values())))
        open_members = [member for member in range(len(self._ranks)) if member not in self._files]
        if not open_members:
            return Finish(tuple(self._files[member] for member in range(len(self._ranks))))
        missing = [m for m in open_members if m in self._missing_since and now - self._missing_since[m] >= missing_s]
        return LookFor(tuple(missing)) if missing else Wait()
