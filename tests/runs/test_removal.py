"""What goes, in which order, and what never goes. [RUN-70..79]"""

from __future__ import annotations

import itertools

import pytest
from run_actors import MANIFEST, W, X, begun, by, commit_of, committed, memory_store, run_with_one_commit, write_folder

from elastickpt.errors import Superseded
from elastickpt.ledger.branch import history
from elastickpt.ledger.epochs import Holding, claim, decide, open_attempt
from elastickpt.ledger.metrics import add_metrics
from elastickpt.ledger.names import AttemptId, commits_path, temporary_name
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import AbortRegister
from elastickpt.ledger.removal import remove_commit, remove_commits, sweep
from elastickpt.storage.local import LocalStore
from elastickpt.storage.memory import MemoryStore
from elastickpt.testing.faults import Crash, CrashAt, FaultyStore, RecordingStore


@pytest.fixture
def store() -> MemoryStore:
    return memory_store()


def folders(store: MemoryStore) -> list[str]:
    return [entry.name for entry in store.entries("") if entry.name != "commits"]


def registers(store: MemoryStore) -> list[str]:
    return [entry.name for entry in store.entries("commits") if not entry.name.startswith("epoch-")]


def test_the_record_goes_first_and_durably_then_the_folder_by_its_name_then_its_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """[RUN-70, RUN-71, RUN-72]"""
    local = LocalStore(tmp_path)
    holding = begun(local, job=1)
    committed(local, holding, step=10)
    committed(local, holding, step=20)
    complete(add_metrics(local, holding, attempt=W, metrics={"loss": 1.0}))
    recording = RecordingStore(local)
    complete(remove_commit(recording, holding, attempt=W))
    assert [(done.name, done.path) for done in recording.operations] == [
        ("entries", "commits"),
        ("remove", "commits/0000000010-1-1.json"),
        ("sync_directory", "commits"),
        ("remove", "commits/0000000010-1-1.metrics-1.json"),
        ("remove_tree", "step-0000000010.1.1.swept"),
        ("rename", "step-0000000010.1.1"),
        ("remove_tree", "step-0000000010.1.1.swept"),
        ("exists", "commits/0000000010-1-1.json"),
    ]
    assert [one.step for one in history(tmp_path)] == [20]


def test_a_newer_claim_stops_removal_before_the_next_record(store: MemoryStore) -> None:
    """What a superseded job can still delete is one checkpoint. [RUN-72]"""
    holding = begun(store, job=1)
    ids = [committed(store, holding, step=step) for step in (10, 20, 30)]
    removing = remove_commits(store, holding, commits=ids[:2])
    next(removing)
    next(removing)  # it has looked; a newer job claims now
    newer = begun(store, job=2, continued=ids[2])
    with pytest.raises(Superseded):
        complete(removing)
    assert [one.step for one in history(store.url)] == [30, 20]
    assert newer.adopted.commits == tuple(ids)


def test_a_removal_that_was_interrupted_anywhere_is_ended_by_the_next_sweep() -> None:
    """[RUN-71]"""
    for n in itertools.count(1):
        store = memory_store()
        holding = begun(store, job=1)
        committed(store, holding, step=10)
        newest = committed(store, holding, step=20)
        faulty = FaultyStore(store, CrashAt(n, mode="torn"))
        try:
            complete(remove_commit(faulty, holding, attempt=W))
        except Crash:
            entries = history(store.url)
            assert [one for one in entries if one.commit is None] == []
            if W in {one.id for one in entries}:
                continue
            complete(sweep(store, begun(store, job=2, continued=newest)))
            assert folders(store) == [newest.folder]
            assert registers(store) == [newest.register]
        else:
            break
    assert n > 5


def test_attempts_of_older_epochs_without_a_counting_commit_go(store: MemoryStore) -> None:
    """Those that may be whole only once the live branch has their step, or a later one. [RUN-75, RUN-77, RUN-104]"""
    holding = begun(store, job=1)
    committed(store, holding, step=10)
    complete(write_folder(store, X))
    aborted = AttemptId(30, 1, 1)
    complete(write_folder(store, aborted))
    complete(decide(store, AbortRegister(aborted, "full")))
    torn = AttemptId(35, 1, 1)
    store.make_directories(torn.folder)
    newer = begun(store, job=2, continued=W)
    inert = AttemptId(40, 1, 1)
    complete(write_folder(store, inert))
    complete(decide(store, commit_of(inert)))
    report = complete(sweep(store, newer))
    assert (report.removed, report.passed, report.waiting) == ((aborted, torn), (), (X, inert))
    assert (folders(store), registers(store)) == ([W.folder, X.folder, inert.folder], [W.register, inert.register])
    passing = committed(store, newer, step=39)
    assert complete(sweep(store, newer)).passed == (X,)
    last = committed(store, newer, step=40)
    report = complete(sweep(store, newer))
    assert (report.removed, report.passed, report.waiting) == ((inert,), (inert,), ())
    live = (W, passing, last)
    assert (folders(store), registers(store)) == ([one.folder for one in live], [one.register for one in live])


def test_an_attempt_of_this_epoch_goes_only_after_its_register_says_abort(store: MemoryStore) -> None:
    """[RUN-76]"""
    holding = begun(store, job=1)
    dead = complete(open_attempt(store, holding, step=10))
    complete(write_folder(store, dead))
    alive = complete(open_attempt(store, holding, step=20))
    complete(write_folder(store, alive))
    recording = RecordingStore(store)
    assert complete(sweep(recording, holding, in_flight={alive})).removed == (dead,)
    done = [(one.name, one.path) for one in recording.operations]
    assert done.index(("create", commits_path(dead.register))) < done.index(("rename", dead.folder))
    assert isinstance(complete(decide(store, commit_of(dead))), AbortRegister)
    assert folders(store) == [alive.folder]


def test_an_attempt_that_commits_while_it_is_swept_stays(store: MemoryStore) -> None:
    """[RUN-76]"""
    holding = begun(store, job=1)
    attempt = complete(open_attempt(store, holding, step=10))
    complete(write_folder(store, attempt))
    sweeping = sweep(store, holding)
    for _ in range(4):
        next(sweeping)
    complete(decide(store, commit_of(attempt)))
    assert complete(sweeping).removed == ()
    assert store.exists(f"{attempt.folder}/{MANIFEST}")
    assert [one.step for one in history(store.url)] == [10]


def test_abandoned_commits_are_not_swept(store: MemoryStore) -> None:
    """They count; retention judges them. [RUN-79]"""
    holding = begun(store, job=1)
    committed(store, holding, step=10)
    committed(store, holding, step=20)
    newer = begun(store, job=1, continued=W)
    assert complete(sweep(store, newer)).removed == ()
    assert [(one.step, one.state) for one in history(store.url)] == [(10, "live"), (20, "abandoned")]


def test_a_superseded_job_sweeps_nothing(store: MemoryStore) -> None:
    """[RUN-72]"""
    run_with_one_commit(store)
    old = complete(claim(store, by(2)))
    begun(store, job=3, continued=W)
    with pytest.raises(Superseded):
        complete(sweep(store, old))
    assert folders(store) == [W.folder, X.folder]


def leftover(store: MemoryStore, target: str) -> str:
    name = temporary_name(target)
    store.create(commits_path(name), b"torn")
    return name


def test_temporary_files_go_when_their_name_is_taken_or_their_epoch_is_over(store: MemoryStore) -> None:
    """Nobody who may still win is disturbed. [RUN-78]"""
    holding: Holding = begun(store, job=1)
    committed(store, holding, step=10)
    kept = leftover(store, AttemptId(20, 2, 1).register)
    leftover(store, AttemptId(20, 1, 1).register)
    newer = begun(store, job=2, continued=W)
    leftover(store, "epoch-2.json")
    leftover(store, "epoch-2.start.json")
    claiming = leftover(store, "epoch-3.json")
    complete(sweep(store, newer))
    assert [entry.name for entry in store.entries("commits") if entry.name.startswith(".")] == sorted([kept, claiming])


def test_a_file_that_means_nothing_is_left_alone(store: MemoryStore) -> None:
    """[RUN-3]"""
    run_with_one_commit(store)
    store.make_directories("step-latest")
    store.make_directories("notes")
    store.create("commits/README", b"")
    complete(sweep(store, begun(store, job=2, continued=W)))
    assert store.exists("step-latest")
    assert store.exists("notes")
    assert store.exists("commits/README")
