"""Retention and sweeping beside training, over a store in which any single operation fails: training hears nothing of it, what
counts stands, and what comes after goes on."""

from __future__ import annotations

import errno
import itertools
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from run_actors import MANIFEST, W, begun, by, committed, write_folder

from elastickpt.ledger.branch import CommitEntry, entries_of
from elastickpt.ledger.epochs import Holding, claim, open_attempt, start
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.retention import Keep
from elastickpt.ledger.stored import read_view
from elastickpt.runs.upkeep import Upkeep
from elastickpt.storage.local import LocalStore
from elastickpt.storage.store import Store
from elastickpt.testing.faults import FailAt, FaultyStore, RecordingStore

KEEP = Keep(last=2)
LIMIT_S = 60.0
FAULTS = (
    FailAt(1, errno.EIO, "after"),
    FailAt(1, errno.ENOSPC, "before", lasting="from then on"),
    FailAt(1, errno.EIO, "before"),
    FailAt(1, errno.ENOSPC, "torn"),
)
FAILURES = [pytest.param(fault, marks=() if fault in FAULTS[:2] else pytest.mark.long) for fault in FAULTS]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory if the machine has such a directory: hundreds of runs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as found:
        yield Path(found)


def new_store(folder: Path) -> LocalStore:
    return LocalStore(tempfile.mkdtemp(dir=folder))


def run_to_go_on_with(store: Store) -> tuple[Holding, AttemptId]:
    """Three commits of a job that is gone, the folder of what it did not finish, and a second job with one commit."""
    first = begun(store, job=1)
    for step in (10, 20, 30):
        committed(store, first, step=step)
    dead = complete(open_attempt(store, first, step=40))
    complete(write_folder(store, dead))
    holding = complete(claim(store, by(2)))
    complete(start(store, holding, continued=AttemptId(30, 1, 1)))
    return holding, committed(store, holding, step=40)


def work(store: Store, holding: Holding) -> None:
    """All that a run asks of its upkeep; returns when it is done or has failed."""
    upkeep = Upkeep(store, KEEP)
    upkeep.started(holding, verified={})
    upkeep.add_metrics(40, {"loss": 1.0})
    upkeep.committed()
    done: list[bool] = []
    upkeep.call(lambda: done.append(True))
    upkeep.close(limit_s=LIMIT_S)
    assert done == [True], "its thread ended, or hangs"


def listed(store: Store) -> tuple[CommitEntry, ...]:
    return entries_of(complete(read_view(store)))


def demand_whole(store: Store, newest: AttemptId) -> list[AttemptId]:
    """What is listed stands, the two that are kept among it."""
    entries = listed(store)
    for entry in entries:
        assert entry.commit is not None, entry.problem
        assert store.read(f"{entry.folder}/{MANIFEST}", 100) == b"whole"
    found = [entry.id for entry in entries]
    assert found[:2] == [newest, AttemptId(30, 1, 1)]
    return found


@pytest.mark.parametrize("fault", FAILURES)
def test_whatever_operation_fails_nothing_that_is_kept_is_lost_and_the_next_one_ends_it(
    folder: Path, fault: FailAt, caplog: pytest.LogCaptureFixture
) -> None:
    said = 0
    for n in itertools.count(1):
        store = new_store(folder)
        holding, newest = run_to_go_on_with(store)
        faulty = FaultyStore(store, replace(fault, n=n))
        caplog.clear()
        work(faulty, holding)
        assert [one for one in caplog.records if one.levelno >= logging.ERROR] == [], faulty.struck
        demand_whole(store, newest)
        said += bool(caplog.records)
        caplog.clear()
        work(store, holding)
        assert [one for one in caplog.records if "removed, though it had a manifest" not in one.getMessage()] == []
        assert demand_whole(store, newest) == [newest, AttemptId(30, 1, 1)]
        assert {entry.name for entry in store.entries("")} - {"latest"} == {
            "commits",
            *(one.folder for one in (newest, AttemptId(30, 1, 1))),
        }
        committed(store, holding, step=50)
        if faulty.struck is None:
            break
    assert n > 40
    assert said > 10


def test_an_upkeep_removes_what_is_not_kept_and_what_is_dead(folder: Path) -> None:
    store = new_store(folder)
    holding, newest = run_to_go_on_with(store)
    recording = RecordingStore(store)
    work(recording, holding)
    assert [one.id for one in listed(store)] == [newest, AttemptId(30, 1, 1)]
    assert listed(store)[0].metrics == (("loss", 1.0),)
    removed = [one.path for one in recording.operations if one.name == "rename" and one.path.startswith("step-")]
    assert removed == [AttemptId(40, 1, 1).folder, W.folder, AttemptId(20, 1, 1).folder]
