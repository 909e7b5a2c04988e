"""Objects are created whole, once, by one creator; after a lost answer what stands there decides. [RUN-20..24]"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator

import pytest
from run_actors import Without, memory_store

from elastickpt.errors import CapabilityMissing, StorageFailed
from elastickpt.ledger.names import COMMITS, listing_of
from elastickpt.ledger.objects import complete, create_exclusively
from elastickpt.storage.local import LocalStore
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import Store
from elastickpt.testing.faults import CHANGING, Crash, CrashAt, FailAt, FaultyStore, RecordingStore

NAME = "epoch-1.json"
MODES = [("before", "half"), ("after", "half"), ("torn", "half"), ("torn", "first byte"), ("torn", "all but last byte")]


@pytest.fixture(params=["local", "memory", "memory without conditional puts"])
def inner(request: pytest.FixtureRequest, tmp_path) -> Store:  # type: ignore[no-untyped-def]
    store: Store = LocalStore(tmp_path) if request.param == "local" else memory_store()
    store.make_directories(COMMITS)
    return Without(store, conditional_put=False) if "without" in request.param else store


def faults(inner: Store, *, mode: str, torn: str) -> Iterator[FaultyStore]:
    """The store with its first, second, ... changing operation failing, until none does."""
    for n in itertools.count(1):
        store = FaultyStore(inner, FailAt(n, errno=errno.EIO, mode=mode, torn=torn), counted=CHANGING)  # type: ignore[arg-type]
        yield store
        if store.struck is None:
            return


def test_the_first_one_stands_and_the_second_obeys(inner: Store) -> None:
    """[RUN-20, RUN-22]"""
    assert complete(create_exclusively(inner, NAME, b"first")) == b"first"
    assert complete(create_exclusively(inner, NAME, b"second")) == b"first"
    assert [entry.name for entry in inner.entries(COMMITS)] == [NAME]


@pytest.mark.parametrize(("mode", "torn"), MODES)
def test_after_any_failed_operation_the_object_is_absent_or_whole_and_asking_again_tells(
    inner: Store, mode: str, torn: str
) -> None:
    """A lost answer is an answer once what stands there was read. [RUN-21, RUN-22]"""
    outcomes = set()
    if mode == "torn" and inner.capabilities.conditional_put:
        pytest.skip("a conditional put is not torn")
    for number, store in enumerate(faults(inner, mode=mode, torn=torn)):
        name = f"epoch-{number + 1}.json"
        try:
            said = complete(create_exclusively(store, name, b"ours"))
        except StorageFailed:
            said = None
        found = inner.read(f"{COMMITS}/{name}", 10) if inner.exists(f"{COMMITS}/{name}") else None
        assert found in (None, b"ours")
        assert said in (None, found)
        outcomes.add((said, found, store.struck is None))
        assert complete(create_exclusively(inner, name, b"again")) == (found or b"again")
    assert (b"ours", b"ours", True) in outcomes
    if mode == "after":
        assert (b"ours", b"ours", False) in outcomes  # the answer was lost, and found again


def test_a_crash_at_any_operation_leaves_it_absent_or_whole(inner: Store) -> None:
    """[RUN-21]"""
    for n in itertools.count(1):
        name = f"epoch-{n}.json"
        store = FaultyStore(inner, CrashAt(n))
        try:
            complete(create_exclusively(store, name, b"ours"))
        except Crash:
            pass
        else:
            break
        if inner.exists(f"{COMMITS}/{name}"):
            assert inner.read(f"{COMMITS}/{name}", 10) == b"ours"
        complete(create_exclusively(inner, name, b"ours"))
        assert inner.read(f"{COMMITS}/{name}", 10) == b"ours"
    listing_of(inner.entries(COMMITS))  # what crashes left is passed over


def test_it_is_whole_and_durable_before_it_has_its_name_and_the_name_before_the_answer(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """[RUN-21, RUN-23]"""
    store = RecordingStore(LocalStore(tmp_path))
    store.make_directories(COMMITS)
    complete(create_exclusively(store, NAME, b"ours"))
    complete(create_exclusively(store, NAME, b"theirs"))
    done = [operation.name for operation in store.operations][1:]
    assert done[:4] == ["create", "sync_file", "rename", "sync_directory"]
    assert done[4:] == ["create", "sync_file", "rename", "remove", "read", "sync_directory"]


def test_a_store_on_which_two_could_win_is_refused_by_name() -> None:
    """[RUN-24]"""
    store = Without(memory_store(), conditional_put=False, no_replace_rename=False)
    store.make_directories(COMMITS)
    with pytest.raises(CapabilityMissing, match="conditional_put or no_replace_rename"):
        complete(create_exclusively(store, NAME, b"ours"))


def test_many_threads_have_one_winner(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """[RUN-20]"""
    from concurrent.futures import ThreadPoolExecutor

    store = LocalStore(tmp_path)
    store.make_directories(COMMITS)
    for round_ in range(20):
        name = f"epoch-{round_ + 1}.json"
        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(lambda k, name=name: complete(create_exclusively(store, name, b"%d" % k)), range(8)))
        assert found == {store.read(f"{COMMITS}/{name}", 10)}


def test_memory_is_a_store_with_conditional_puts() -> None:
    """What the schedules lean on."""
    assert isinstance(memory_store(), MemoryStore)
    assert memory_store().capabilities.conditional_put
