"""Commits go: the record first, durably, then what it named. A newer claim stops it before the next record. [RUN-70..74]"""

from __future__ import annotations

from collections.abc import Iterable

from elastickpt.ledger.create import remove_register
from elastickpt.ledger.epochs import Holding, require_newest
from elastickpt.ledger.folders import remove_folder
from elastickpt.ledger.names import AttemptId, RunObjects, commits_path
from elastickpt.ledger.steps import NOW, Steps
from elastickpt.storage.store import Store


def remove_commits(store: Store, holding: Holding, *, commits: Iterable[AttemptId]) -> Steps[tuple[AttemptId, ...]]:
    """The commits are gone, one after the other in the order given. Returns them.

    Raises Superseded before the first one that a newer claim forbids, StorageFailed kinds; what was begun is inert then, and
    the next sweep ends it.
    """
    removed = []
    for attempt in commits:
        yield from remove_commit(store, holding, attempt=attempt)
        removed.append(attempt)
    return tuple(removed)


def remove_commit(store: Store, holding: Holding, *, attempt: AttemptId) -> Steps[None]:
    """The commit is gone: its register, its metrics, its folder, in that order."""
    listing = yield from require_newest(store, holding.epoch)  # [RUN-72]
    yield from remove_register(store, attempt)  # [RUN-70]
    yield from remove_metrics(store, listing, attempt)
    yield from remove_folder(store, attempt)
    yield NOW
    if store.exists(commits_path(attempt.register)):  # linked once more by a late writer, before the folder went [RUN-73]
        yield from remove_register(store, attempt)


def remove_metrics(store: Store, listing: RunObjects, attempt: AttemptId) -> Steps[None]:
    for number in listing.metrics_of(attempt):
        yield NOW
        store.remove(commits_path(attempt.metrics(number)))
