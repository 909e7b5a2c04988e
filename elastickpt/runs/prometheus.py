"""A run's saves and restores as metrics for Prometheus. Needs prometheus-client, the extra `metrics`.

elastickpt_saves_total{outcome}              committed, failed, skipped
elastickpt_saved_bytes_total                 of committed saves
elastickpt_save_stall_seconds_total          how long training stood still for saves
elastickpt_save_write_seconds_total          writing, of committed saves
elastickpt_save_commit_seconds_total         from durable to acknowledged, of committed saves
elastickpt_last_committed_step
elastickpt_last_commit_time_seconds          since 1970
elastickpt_last_save_stall_seconds
elastickpt_last_save_bytes
elastickpt_restores_total
elastickpt_restore_fallbacks_total           newer checkpoints that restores could not take

All have the label `run`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from elastickpt.errors import Refused
from elastickpt.runs.events import RestoreEvent, SaveEvent, SaveOutcome

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge


@dataclass(frozen=True, slots=True)
class _Collectors:
    saves: Counter
    saved_bytes: Counter
    stall: Counter
    write: Counter
    commit: Counter
    last_step: Gauge
    last_time: Gauge
    last_stall: Gauge
    last_bytes: Gauge
    restores: Counter
    fallbacks: Counter


class RunMetrics:
    """Metrics of the run named `run`, in the client's default registry or another one; of one rank, by convention rank 0.

    Every one exists from the beginning, counters at 0. Not blocking; from any thread. Raises Refused without the package.
    """

    def __init__(self, run: str, *, registry: CollectorRegistry | None = None) -> None:
        try:
            from prometheus_client import REGISTRY
        except ImportError as error:
            raise Refused("metrics for Prometheus need prometheus-client: pip install 'elastickpt[metrics]'") from error
        self._run = run
        self._to = _collectors(REGISTRY if registry is None else registry)
        for outcome in get_args(SaveOutcome):
            self._to.saves.labels(run=run, outcome=outcome)
        for collector in (self._to.saved_bytes, self._to.stall, self._to.write, self._to.commit):
            collector.labels(run=run)
        for collector in (self._to.restores, self._to.fallbacks):
            collector.labels(run=run)

    def saved(self, event: SaveEvent) -> None:
        """Counts one save."""
        to, run = self._to, self._run
        to.saves.labels(run=run, outcome=event.outcome).inc()
        to.stall.labels(run=run).inc(event.stall_s)
        to.last_stall.labels(run=run).set(event.stall_s)
        if event.outcome != "committed":
            return
        to.saved_bytes.labels(run=run).inc(event.nbytes)
        to.write.labels(run=run).inc(event.write_s)
        to.commit.labels(run=run).inc(event.commit_s)
        to.last_step.labels(run=run).set(event.step)
        to.last_time.labels(run=run).set(event.time)
        to.last_bytes.labels(run=run).set(event.nbytes)

    def restored(self, event: RestoreEvent) -> None:
        """Counts one restore."""
        self._to.restores.labels(run=self._run).inc()
        self._to.fallbacks.labels(run=self._run).inc(event.skipped)


# A registry takes each name once; several runs of a process share the collectors, apart by their label.
_KNOWN: weakref.WeakKeyDictionary[CollectorRegistry, _Collectors] = weakref.WeakKeyDictionary()


def _collectors(registry: CollectorRegistry) -> _Collectors:
    from prometheus_client import Counter, Gauge

    known = _KNOWN.get(registry)
    if known is not None:
        return known

    def counter(name: str, about: str, *labels: str) -> Counter:
        return Counter(f"elastickpt_{name}", about, ("run", *labels), registry=registry)

    def gauge(name: str, about: str) -> Gauge:
        return Gauge(f"elastickpt_{name}", about, ("run",), registry=registry)

    found = _Collectors(
        saves=counter("saves", "Saves, by how they ended", "outcome"),
        saved_bytes=counter("saved_bytes", "Bytes of arrays in committed saves"),
        stall=counter("save_stall_seconds", "Seconds that training stood still for saves"),
        write=counter("save_write_seconds", "Seconds of writing, of committed saves"),
        commit=counter("save_commit_seconds", "Seconds from durable to acknowledged, of committed saves"),
        last_step=gauge("last_committed_step", "Step of the newest commit of this process"),
        last_time=gauge("last_commit_time_seconds", "When it was acknowledged, since 1970"),
        last_stall=gauge("last_save_stall_seconds", "Seconds that training stood still for the last save"),
        last_bytes=gauge("last_save_bytes", "Bytes of arrays of the newest commit"),
        restores=counter("restores", "Restores"),
        fallbacks=counter("restore_fallbacks", "Newer checkpoints that restores could not take"),
    )
    _KNOWN[registry] = found
    return found
