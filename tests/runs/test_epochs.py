"""Claims, starts, attempts, commits and acknowledgements, one after the other. [RUN-30..44]"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import pytest
from run_actors import (
    W,
    Without,
    X,
    begun,
    by,
    commit_of,
    committed,
    memory_store,
    run_with_one_commit,
    write_folder,
)

from elastickpt.errors import CheckpointError, Damaged, PathOccupied, Refused, StorageFailed, Superseded
from elastickpt.ledger.branch import history
from elastickpt.ledger.epochs import Acknowledgement, Holding, acknowledge, claim, decide, open_attempt, start
from elastickpt.ledger.metrics import add_metrics
from elastickpt.ledger.names import AttemptId, adopted_name, commits_path
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import AbortRegister, CommitRegister
from elastickpt.ledger.removal import remove_commit
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import Store
from elastickpt.testing.faults import Crash, CrashAt, FailAt, FaultyStore, RecordingStore


def live(store: MemoryStore) -> list[AttemptId]:
    return [one.id for one in history(store.url) if one.state == "live"]


def acknowledged(store: Store, attempt: AttemptId, *, limit_s: float = 2) -> tuple[Acknowledgement, int]:
    """And how often it waited."""
    waits: list[float] = []
    return complete(acknowledge(store, attempt, poll_s=0.5, limit_s=limit_s), sleep=waits.append), len(waits)


def test_epochs_count_from_one_and_each_claim_takes_the_next() -> None:
    """[RUN-32]"""
    store = memory_store()
    assert [complete(claim(store, by(job))).epoch for job in (1, 2, 3)] == [1, 2, 3]


def test_an_epoch_adopts_what_the_one_before_adopted_and_committed() -> None:
    """[RUN-34]"""
    store = memory_store()
    committed(store, begun(store, job=1), step=10)
    second = begun(store, job=2, continued=W)
    committed(store, second, step=20)
    third = complete(claim(store, by(3)))
    assert (second.adopted.commits, third.adopted.commits) == ((W,), (W, AttemptId(20, 2, 1)))


def test_a_job_that_stopped_after_its_claim_is_closed_and_adopts_nothing_any_more() -> None:
    """[RUN-33, RUN-36]"""
    store = memory_store()
    run_with_one_commit(store)
    stopped = claim(store, by(2))
    while not store.exists(commits_path("epoch-2.json")):
        next(stopped)
    newer = begun(store, job=3, continued=W)
    with pytest.raises(Superseded, match=r"epoch 2 of this job was superseded by epoch 3 \(host host3, process 103\)"):
        complete(stopped)
    assert (newer.epoch, newer.adopted.commits, live(store)) == (3, (W,), [W])


WRITES: dict[str, Callable[[Store, Holding], object]] = {
    "start": lambda store, holding: complete(start(store, holding, continued=None)),
    "open_attempt": lambda store, holding: complete(open_attempt(store, holding, step=50)),
    "remove_commit": lambda store, holding: complete(remove_commit(store, holding, attempt=W)),
    "add_metrics": lambda store, holding: complete(add_metrics(store, holding, attempt=W, metrics={"loss": 1.0})),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_superseded_job_changes_nothing(write: str) -> None:
    """[RUN-31, RUN-72]"""
    store = memory_store()
    first = begun(store, job=1)
    committed(store, first, step=10)
    begun(store, job=2, continued=W)
    recording = RecordingStore(store)
    with pytest.raises(Superseded, match="host2"):
        WRITES[write](recording, first)
    assert {operation.name for operation in recording.operations} <= {"entries", "read"}


def test_what_an_older_epoch_commits_after_a_newer_one_adopted_is_inert() -> None:
    """[RUN-30, RUN-43]"""
    store = memory_store()
    run_with_one_commit(store)
    begun(store, job=2, continued=W)
    assert isinstance(complete(decide(store, commit_of(X))), CommitRegister)
    assert acknowledged(store, X) == (Acknowledgement.SUPERSEDED, 0)
    assert live(store) == [W]
    assert X not in complete(claim(store, by(3))).adopted.commits


def test_a_writer_waits_for_the_newest_claim_to_adopt_and_says_so_at_its_limit() -> None:
    """[RUN-43]"""
    store = memory_store()
    run_with_one_commit(store)
    complete(decide(store, commit_of(X)))
    claiming = claim(store, by(2))
    while not store.exists(commits_path("epoch-2.json")):
        next(claiming)
    assert acknowledged(store, X) == (Acknowledgement.UNDECIDED, 4)
    complete(claiming)
    assert acknowledged(store, X) == (Acknowledgement.ACKNOWLEDGED, 0)


def test_a_void_epoch_decides_nothing_for_a_writer() -> None:
    """[RUN-43]"""
    store = memory_store()
    run_with_one_commit(store)
    complete(decide(store, commit_of(X)))
    for job in (2, 3):
        claiming = claim(store, by(job))
        while not store.exists(commits_path(f"epoch-{job}.json")):
            next(claiming)
    while not store.exists(commits_path(adopted_name(2))):
        next(claiming)
    assert acknowledged(store, X)[0] is Acknowledgement.UNDECIDED
    complete(claiming)
    assert acknowledged(store, X)[0] is Acknowledgement.ACKNOWLEDGED


def test_a_register_says_one_thing_for_good() -> None:
    """[RUN-40]"""
    store = memory_store()
    run_with_one_commit(store)
    abort = AbortRegister(X, "rank 3: disk full")
    assert complete(decide(store, abort)) == abort
    assert complete(decide(store, commit_of(X))) == abort
    assert live(store) == [W]


def test_a_commit_that_was_removed_and_is_linked_again_is_taken_back_by_its_writer() -> None:
    """[RUN-44, RUN-51]"""
    store = memory_store()
    holding = begun(store, job=1)
    committed(store, holding, step=10)
    newer = committed(store, holding, step=20)
    complete(remove_commit(store, holding, attempt=W))
    complete(decide(store, commit_of(W)))
    (broken,) = [one for one in history(store.url) if one.id == W]
    assert (broken.commit, "folder is gone" in broken.problem) == (None, True)
    assert acknowledged(store, W) == (Acknowledgement.REMOVED, 0)
    assert live(store) == [newer]
    assert acknowledged(store, W) == (Acknowledgement.REMOVED, 0)


def test_no_attempt_begins_before_the_epoch_has_started() -> None:
    """[RUN-37]"""
    store = memory_store()
    holding = complete(claim(store, by(1)))
    with pytest.raises(Refused, match="has not started"):
        complete(open_attempt(store, holding, step=1))


def test_an_epoch_starts_once_and_from_what_it_adopted() -> None:
    """[RUN-37]"""
    store = memory_store()
    run_with_one_commit(store)
    holding = begun(store, job=2, continued=W)
    assert complete(start(store, holding, continued=W)).continued == W
    assert complete(start(store, holding, continued=W, keep="last=9")).keep is None  # what stands stands
    with pytest.raises(Refused, match="has started already"):
        complete(start(store, holding, continued=None))
    with pytest.raises(Refused, match="did not adopt"):
        complete(start(store, holding, continued=X))


def test_the_next_attempt_at_a_step_begins_when_the_one_before_says_abort() -> None:
    """[RUN-38]"""
    store = memory_store()
    holding = begun(store, job=1)
    first = complete(open_attempt(store, holding, step=10))
    complete(write_folder(store, first))
    second = complete(open_attempt(store, holding, step=10))
    assert (first.attempt, second.attempt) == (1, 2)
    assert isinstance(complete(decide(store, commit_of(first))), AbortRegister)
    complete(decide(store, commit_of(second)))
    with pytest.raises(PathOccupied, match="step 10 is committed in epoch 1"):
        complete(open_attempt(store, holding, step=10))


def test_an_attempt_that_committed_while_nobody_heard_it_keeps_its_step() -> None:
    """The abort of the next one finds the commit, and obeys. [RUN-38]"""
    store = memory_store()
    holding = begun(store, job=1)
    first = complete(open_attempt(store, holding, step=10))
    complete(write_folder(store, first))
    opening = open_attempt(store, holding, step=10)
    for _ in range(3):
        next(opening)
    complete(decide(store, commit_of(first)))
    with pytest.raises(PathOccupied, match="step 10 is committed"):
        complete(opening)


def test_steps_of_an_epoch_rise() -> None:
    """[RUN-39]"""
    store = memory_store()
    holding = begun(store, job=1)
    committed(store, holding, step=20)
    with pytest.raises(Refused, match="step 10 lies behind step 20"):
        complete(open_attempt(store, holding, step=10))


def test_a_damaged_register_is_adopted_and_shown_and_nothing_else_is_lost() -> None:
    """[RUN-35]"""
    store = memory_store()
    holding = begun(store, job=1)
    committed(store, holding, step=10)
    other = committed(store, holding, step=20)
    path = commits_path(W.register)
    data = store.read(path, 10_000)
    store.remove(path)
    store.create(path, data.replace(b"commit", b"commix"))
    begun(store, job=2, continued=other)
    entries = history(store.url)
    assert [(one.id, one.commit is None) for one in entries] == [(other, False), (W, True)]
    assert "expected xxh3-128" in entries[1].problem


def test_a_damaged_adopted_object_is_said_and_nothing_is_guessed() -> None:
    """[RUN-54]"""
    store = memory_store()
    run_with_one_commit(store)
    path = commits_path(adopted_name(1))
    data = store.read(path, 10_000)
    store.remove(path)
    store.create(path, data[:-2])
    with pytest.raises(Damaged, match=r"epoch-1\.adopted\.json"):
        history(store.url)
    with pytest.raises(Damaged, match=r"epoch-1\.adopted\.json"):
        complete(claim(store, by(2)))


def story(store: Store) -> None:
    """A job that continues, commits, and removes; what it was told is what holds."""
    holding = complete(claim(store, by(2)))
    complete(start(store, holding, continued=W))
    attempt = committed(store, holding, step=30)
    complete(add_metrics(store, holding, attempt=attempt, metrics={"loss": 0.5}))
    complete(remove_commit(store, holding, attempt=W))


def still_works(store: MemoryStore) -> None:
    """A good checkpoint is there, and the next job continues from it, commits and removes."""
    before = [one.id for one in history(store.url) if one.state == "live" and one.commit is not None]
    assert before, "no good checkpoint is left"
    holding = begun(store, job=9, continued=before[0])
    attempt = committed(store, holding, step=90)
    assert [one.id for one in history(store.url) if one.state == "live"] == [attempt, *before]


@pytest.mark.parametrize("store_kind", ["conditional puts", "links"])
@pytest.mark.parametrize("mode", ["before", "after"])
def test_after_any_failed_operation_the_next_job_works(mode: str, store_kind: str) -> None:
    """[RUN-22]"""
    for n in itertools.count(1):
        store = memory_store()
        run_with_one_commit(store)
        inner = Without(store, conditional_put=store_kind == "conditional puts")
        faulty = FaultyStore(inner, FailAt(n, errno=errno.EIO, mode=mode))  # type: ignore[arg-type]
        try:
            story(faulty)
        except StorageFailed:
            pass
        else:
            assert live(store)[0].step == 30, "what it was told does not hold"
        still_works(store)
        if faulty.struck is None:
            break
    assert n > 20


@pytest.mark.parametrize("mode", ["before", "after", "torn"])
def test_after_a_crash_at_any_operation_the_next_job_works(mode: str) -> None:
    """[RUN-33]"""
    for n in itertools.count(1):
        store = memory_store()
        run_with_one_commit(store)
        faulty = FaultyStore(Without(store, conditional_put=False), CrashAt(n, mode=mode))  # type: ignore[arg-type]
        try:
            story(faulty)
        except Crash:
            still_works(store)
        except CheckpointError:
            pytest.fail("a crash was taken for an error")
        else:
            break
    assert n > 20
