"""What start objects tell besides: what restores found out, and what the newest job keeps. [RUN-65..67]"""

from __future__ import annotations

import pytest
from run_actors import W, X, begun, by, committed, memory_store

from elastickpt.errors import StorageFailed
from elastickpt.ledger.branch import live_branch
from elastickpt.ledger.epochs import claim, start
from elastickpt.ledger.history import Finding, KeepRules, RestoreHistory, read_told
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import Found, PassedOver
from elastickpt.ledger.stored import read_view
from elastickpt.storage.memory import MemoryStore
from elastickpt.testing.faults import RecordingStore

BAD = PassedOver(X, "checksum-mismatch", "c.0: block 0")


def restored(store: MemoryStore, job: int, taken: AttemptId | None, *passed: PassedOver, **about: object) -> None:
    """A job that claimed, and started with what it found."""
    found = Found(1000.0 + job, taken is not None, passed)
    complete(start(store, complete(claim(store, by(job))), continued=taken, **{"found": found, **about}))  # type: ignore[arg-type]


def two_commits() -> MemoryStore:
    store = memory_store()
    holding = begun(store, job=1)
    assert [committed(store, holding, step=step) for step in (10, 20)] == [W, X]
    return store


def test_jobs_that_told_nothing_leave_nothing_known() -> None:
    assert complete(read_told(memory_store())) == RestoreHistory()
    assert complete(read_told(two_commits())) == RestoreHistory()


def test_what_was_loaded_is_verified_and_what_was_passed_over_is_damaged() -> None:
    """[RUN-66]"""
    store = two_commits()
    restored(store, 2, W, BAD, keep="last=3")
    told = complete(read_told(store))
    assert told == RestoreHistory({W: Finding(2, 1002.0), X: Finding(2, 1002.0, BAD.kind, BAD.message)}, KeepRules(2, "last=3"))
    assert [told.findings[one].outcome for one in (W, X)] == ["verified", "damaged"]
    assert told.verified() == {W: True, X: False}


def test_what_was_loaded_unverified_is_not_verified() -> None:
    """[RUN-66]"""
    store = two_commits()
    restored(store, 2, W, found=Found(1.5, False))
    assert complete(read_told(store)).findings == {}


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("storage-failed", "unread"),
        ("no-space", "unread"),
        ("malformed", "damaged"),
        ("not-a-checkpoint", "damaged"),
        ("new", "damaged"),
    ],
)
def test_what_the_store_could_not_read_is_not_damaged(kind: str, outcome: str) -> None:
    """Nor is it verified; a kind of a later release is damage."""
    store = two_commits()
    restored(store, 2, W, PassedOver(X, kind, ""))
    told = complete(read_told(store))
    assert told.findings[X].outcome == outcome
    assert told.verified() == ({W: True} if outcome == "unread" else {W: True, X: False})


def test_the_newest_word_about_a_commit_holds_on_any_branch() -> None:
    """Epoch 2 passes X over, epoch 3 takes it, somebody having repaired it; epoch 4 goes on from W and says nothing of X."""
    store = two_commits()
    restored(store, 2, W, BAD)
    restored(store, 3, X)
    restored(store, 4, W)
    told = complete(read_told(store))
    assert told.findings == {W: Finding(4, 1004.0), X: Finding(3, 1003.0)}


def test_the_rules_are_those_of_the_newest_job_that_started() -> None:
    """[RUN-65]"""
    store = two_commits()
    restored(store, 2, W, keep="last=2")
    restored(store, 3, W, keep="all")
    complete(claim(store, by(4)))
    assert complete(read_told(store)).rules == KeepRules(3, "all")
    restored(store, 5, W)
    assert complete(read_told(store)).rules is None


def test_a_damaged_start_object_tells_nothing() -> None:
    store = two_commits()
    restored(store, 2, W, BAD, keep="last=2")
    restored(store, 3, W, keep="last=3")
    data = store.read("commits/epoch-3.start.json", 10**6)
    store.remove("commits/epoch-3.start.json")
    store.create("commits/epoch-3.start.json", data.replace(b"last=3", b"last=4"))
    told = complete(read_told(store))
    assert (set(told.findings), told.rules) == ({W, X}, None)


def test_a_store_that_fails_is_no_answer() -> None:
    class Failing(RecordingStore):
        def read(self, name: str, limit: int) -> bytes:
            raise StorageFailed(name)

    store = two_commits()
    with pytest.raises(StorageFailed):
        complete(read_told(Failing(store)))


def test_what_was_found_decides_nothing_about_what_counts() -> None:
    """[RUN-67]"""
    views = []
    for passed in ((), (BAD,)):
        store = two_commits()
        restored(store, 2, W, *passed)
        view = complete(read_view(store))
        views.append((view.commits, live_branch(view)))
    assert views[0] == views[1]
    assert {commit.id for commit in views[0][0]} == {W, X}
