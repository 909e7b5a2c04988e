"""Who claimed a run, when, and from what each claim continued. Reads only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from elastickpt.errors import Damaged
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.records import Claimer, Void
from elastickpt.ledger.steps import Steps
from elastickpt.ledger.stored import list_commits, read_adopted, read_claim, read_start
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


def epoch_history(store: Store) -> Steps[tuple[EpochEntry, ...]]:
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


def is_claimed_by(store: Store, tokens: Collection[str]) -> Steps[bool]:
    """Whether the newest claim has one of these tokens; one that cannot be read has none. Raises StorageFailed kinds."""
    newest = (yield from list_commits(store)).newest
    try:
        return newest > 0 and (yield from read_claim(store, newest)).by.token in tokens
    except Damaged:
        return False
