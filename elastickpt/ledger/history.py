"""What the jobs of a run said: who claimed it, when, and from what each claim continued; and in their start objects what
their restores found out about checkpoints, and what they keep. Reads only; decides nothing about what counts or is loaded.
[RUN-65..67]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from elastickpt.errors import Damaged, StorageFailed, kinds
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import Operations
from elastickpt.ledger.records import Claimer, Found, Void
from elastickpt.ledger.stored import list_commits, read_adopted, read_claim, read_nothing_loaded, read_start
from elastickpt.storage.store import Store

EpochState = Literal["claimed", "void", "adopted", "started"]


@dataclass(frozen=True, slots=True)
class EpochEntry:
    """One claim of a run. `by` is None, and `problems` say why, where the claim cannot be read.

    claimed    it has not adopted, or cannot be read
    void       a newer claim closed it before it adopted
    adopted    it has not started
    started    it goes on from `continued`; None: from nothing
    """

    epoch: int
    state: EpochState
    by: Claimer | None
    continued: AttemptId | None
    problems: tuple[str, ...] = ()


def epoch_history(store: Store) -> Operations[tuple[EpochEntry, ...]]:
    """All claims of the run, newest first; damaged objects are named in `problems`. Raises StorageFailed kinds."""
    listing = yield from list_commits(store)
    found = []
    for epoch in sorted(listing.claims | listing.adopted | listing.starts, reverse=True):
        problems: list[str] = []
        by: Claimer | None = None
        continued: AttemptId | None = None
        state: EpochState = "claimed"
        try:
            by = (yield from read_claim(store, epoch)).by
        except Damaged as problem:
            problems.append(str(problem))
        try:
            if epoch in listing.adopted:
                state = "void" if isinstance((yield from read_adopted(store, epoch)), Void) else "adopted"
            if epoch in listing.starts:
                continued, state = (yield from read_start(store, epoch)).continued, "started"
        except Damaged as problem:
            problems.append(str(problem))
        found.append(EpochEntry(epoch, state, by, continued, tuple(problems)))
    return tuple(found)


def is_claimed_by(store: Store, tokens: Collection[str]) -> Operations[bool]:
    """Whether the newest claim has one of these tokens; one that cannot be read has none. Raises StorageFailed kinds."""
    newest = (yield from list_commits(store)).newest
    try:
        return newest > 0 and (yield from read_claim(store, newest)).by.token in tokens
    except Damaged:
        return False


FindingOutcome = Literal["verified", "damaged", "unread"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What the newest restore that looked at a commit found: the kind and message of the error for which it was passed over; ""
    for one that it loaded, all that it read verified. `time` in seconds since 1970.

    verified   it was loaded
    damaged    it was passed over, and would be again
    unread     it was passed over because the store failed: it may be whole
    """

    epoch: int
    time: float
    kind: str = ""
    message: str = ""

    @property
    def outcome(self) -> FindingOutcome:
        if not self.kind:
            return "verified"
        return "unread" if issubclass(kinds().get(self.kind, Damaged), StorageFailed) else "damaged"


@dataclass(frozen=True, slots=True)
class KeepRules:
    """What the newest job that started keeps, in words, as it said in this epoch."""

    epoch: int
    words: str


@dataclass(frozen=True, slots=True)
class RestoreHistory:
    """`findings` by commit, whether it still counts or not; `rules` are None where that job did not say."""

    findings: Mapping[AttemptId, Finding] = field(default_factory=lambda: MappingProxyType({}))
    rules: KeepRules | None = None

    def verified(self) -> dict[AttemptId, bool]:
        """What is known of checkpoints, as `judge` takes it."""
        return {one: found.outcome == "verified" for one, found in self.findings.items() if found.outcome != "unread"}


def read_told(store: Store) -> Operations[RestoreHistory]:
    """All start and found objects of the run. One that is not what was written tells nothing here: `epoch_history` names it.

    Raises StorageFailed kinds.
    """
    listing = yield from list_commits(store)
    findings: dict[AttemptId, Finding] = {}
    rules: KeepRules | None = None
    for epoch in sorted(listing.starts | listing.founds):
        if epoch not in listing.starts:
            findings |= yield from _nothing_loaded(store, epoch)
            continue
        try:
            start = yield from read_start(store, epoch)
        except Damaged:
            rules = None
            continue
        findings |= _findings(epoch, start.continued, start.found)
        rules = None if start.keep is None else KeepRules(epoch, start.keep)
    return RestoreHistory(MappingProxyType(findings), rules)


def _nothing_loaded(store: Store, epoch: int) -> Operations[dict[AttemptId, Finding]]:
    try:
        found = yield from read_nothing_loaded(store, epoch)
    except Damaged:
        return {}
    return _findings(epoch, None, found)


def _findings(epoch: int, continued: AttemptId | None, found: Found | None) -> dict[AttemptId, Finding]:
    if found is None:
        return {}
    findings = {one.id: Finding(epoch, found.time, one.kind, one.message) for one in found.passed}
    if found.verified and continued is not None:
        findings[continued] = Finding(epoch, found.time)
    return findings
