"""Saves and restores as metrics."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from elastickpt.errors import Refused
from elastickpt.runs.events import RestoreEvent, SaveEvent, SaveOutcome
from elastickpt.runs.prometheus import RunMetrics

Value = Callable[..., float | None]


def event(step: int, outcome: SaveOutcome, **changes: float) -> SaveEvent:
    about = {"nbytes": 1000, "stall_s": 0.5, "write_s": 2.0, "commit_s": 0.25, "time": 1000.0 + step, **changes}
    return SaveEvent(step, 1, outcome, **about)  # type: ignore[arg-type]


def test_without_the_package_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(Refused, match=r"pip install 'elastickpt\[metrics\]'"):
        RunMetrics("llama")


def test_saves_and_restores_are_counted() -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    metrics = RunMetrics("llama", registry=registry)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"elastickpt_{name}", {"run": "llama", **labels})

    outcomes = ("committed", "failed", "skipped")
    assert [value("saves_total", outcome=outcome) for outcome in outcomes] == [0, 0, 0]
    assert [value(f"{name}_total") for name in ("saved_bytes", "save_stall_seconds", "restore_fallbacks")] == [0, 0, 0]
    metrics.saved(event(10, "committed"))
    metrics.saved(event(20, "committed", nbytes=3000))
    metrics.saved(event(30, "failed", stall_s=1.5))
    metrics.saved(event(40, "skipped", stall_s=0.0))
    metrics.restored(RestoreEvent(20, 2, 3, 3000, 1.0, 1000.0))
    assert [value("saves_total", outcome=outcome) for outcome in outcomes] == [2, 1, 1]
    assert (value("saved_bytes_total"), value("last_save_bytes")) == (4000, 3000)
    assert (value("save_stall_seconds_total"), value("last_save_stall_seconds")) == (2.5, 0.0)
    assert (value("save_write_seconds_total"), value("save_commit_seconds_total")) == (4.0, 0.5)
    assert (value("last_committed_step"), value("last_commit_time_seconds")) == (20, 1020)
    assert (value("restores_total"), value("restore_fallbacks_total")) == (1, 3)
    text = client.generate_latest(registry).decode()
    assert 'elastickpt_saves_total{outcome="committed",run="llama"} 2.0' in text


def test_several_runs_of_a_process_stand_apart() -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    for run, step in (("a", 10), ("b", 20), ("a", 30)):
        RunMetrics(run, registry=registry).saved(event(step, "committed"))
    found = {run: registry.get_sample_value("elastickpt_saves_total", {"run": run, "outcome": "committed"}) for run in "ab"}
    assert found == {"a": 2, "b": 1}
