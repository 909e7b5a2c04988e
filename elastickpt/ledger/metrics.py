"""Metrics that become known after a commit: further small objects beside its register. [RUN-18]"""

from __future__ import annotations

from collections.abc import Mapping

from elastickpt.errors import NotACheckpoint
from elastickpt.ledger.epochs import Holding, require_newest
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import Operations, create_exclusively
from elastickpt.ledger.records import LaterMetrics, encode_metrics, metrics_of
from elastickpt.storage.store import Store


def add_metrics(
    store: Store, holding: Holding, *, attempt: AttemptId, metrics: Mapping[str, float]
) -> Operations[LaterMetrics]:
    """The commit has these metrics from now on; of one name the last one added holds.

    Raises NotACheckpoint where there is no such register, Refused for what is no number, Superseded, StorageFailed kinds.
    """
    values = metrics_of(metrics.items())
    listing = yield from require_newest(store, holding.epoch)
    if attempt not in listing.registers:
        raise NotACheckpoint(f"{store.url}: no commit {attempt} that metrics could be added to")
    number = max(listing.metrics_of(attempt), default=0)
    while True:
        number += 1
        later = LaterMetrics(attempt, number, values)
        data = encode_metrics(later)
        if (yield from create_exclusively(store, attempt.metrics(number), data)) == data:
            return later
