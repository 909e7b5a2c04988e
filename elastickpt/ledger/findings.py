"""What the jobs of a run said in their start objects besides: what their restores found out about checkpoints, and what they
keep. Reads only; it decides nothing about what counts or is loaded. [RUN-65..67]"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from elastickpt.errors import Damaged, StorageFailed, kinds
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.records import Found
from elastickpt.ledger.steps import Steps
from elastickpt.ledger.stored import list_commits, read_nothing_loaded, read_start
from elastickpt.storage.store import Store

Outcome = Literal["verified", "damaged", "unread"]


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
    def outcome(self) -> Outcome:
        if not self.kind:
            return "verified"
        return "unread" if issubclass(kinds().get(self.kind, Damaged), StorageFailed) else "damaged"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the newest job that started keeps, in words, as it said in this epoch."""

    epoch: int
    words: str


@dataclass(frozen=True, slots=True)
class Told:
    """`findings` by commit, whether it still counts or not; `rules` are None where that job did not say."""

    findings: Mapping[AttemptId, Finding] = field(default_factory=lambda: MappingProxyType({}))
    rules: Rules | None = None

    def verified(self) -> dict[AttemptId, bool]:
        """What is known of checkpoints, as `judge` takes it."""
        return {one: found.outcome == "verified" for one, found in self.findings.items() if found.outcome != "unread"}


def read_told(store: Store) -> Steps[Told]:
    """All start and found objects of the run. One that is not what was written tells nothing here: `epoch_history` names it.

    Raises StorageFailed kinds.
    """
    listing = yield from list_commits(store)
    findings: dict[AttemptId, Finding] = {}
    rules: Rules | None = None
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
        rules = None if start.keep is None else Rules(epoch, start.keep)
    return Told(MappingProxyType(findings), rules)


def _nothing_loaded(store: Store, epoch: int) -> Steps[dict[AttemptId, Finding]]:
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
