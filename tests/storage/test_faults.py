"""The fault-injecting stores themselves: what is done before, after and in the middle of the operation that fails."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from elastickpt.errors import CheckpointError, MissingFile, NoSpace, StorageFailed
from elastickpt.storage.local import LocalStore
from elastickpt.storage.memory import MemoryStore
from elastickpt.testing.faults import ALL, CHANGING, CallAt, Crash, CrashAt, FailAt, FaultyStore, RecordingStore
from elastickpt.testing.store_suite import StoreSuite

MODES = [("before", "half"), ("after", "half"), ("torn", "half"), ("torn", "first byte"), ("torn", "all but last byte")]


@pytest.fixture
def inner():
    return MemoryStore(f"test-{uuid.uuid4().hex}")


class TestRecording(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path):
        return RecordingStore(LocalStore(tmp_path))


class TestFaultless(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path):
        return FaultyStore(LocalStore(tmp_path), FailAt(0))


def save(store):
    """A small protocol of the shape that a checkpoint has: draft, ranges, record, rename."""
    store.make_directories("draft")
    with closing(store.open_writer("draft/chunk", 8)) as writer:
        writer.write(0, memoryview(b"abcd"))
        writer.write(4, memoryview(b"efgh"))
        writer.sync()
    store.create("draft/record", b"whole")
    store.sync_file("draft/record")
    store.rename("draft", "final")


def test_every_operation_is_recorded_in_order(inner):
    store = RecordingStore(inner)
    save(store)
    assert store.read("final/record", 5) == b"whole"
    assert [(operation.name, operation.path) for operation in store.operations] == [
        ("make_directories", "draft"),
        ("open_writer", "draft/chunk"),
        ("writer.write", "draft/chunk"),
        ("writer.write", "draft/chunk"),
        ("writer.sync", "draft/chunk"),
        ("writer.close", "draft/chunk"),
        ("create", "draft/record"),
        ("sync_file", "draft/record"),
        ("rename", "draft"),
        ("read", "final/record"),
    ]
    assert [operation.index for operation in store.operations] == list(range(1, 11))
    assert store.operations[3].detail == "4 bytes at 4"
    assert store.operations[8].detail == "to final"


@pytest.mark.parametrize(("mode", "torn"), MODES)
@pytest.mark.parametrize("fault", [FailAt, CrashAt])
def test_all_operations_are_reached_and_the_result_is_whole_or_absent(fault, mode, torn):
    for n in itertools.count(1):
        inner = MemoryStore(f"test-{uuid.uuid4().hex}")
        store = FaultyStore(inner, fault(n, mode=mode, torn=torn))
        try:
            save(store)
        except (CheckpointError, Crash):
            assert store.struck.index == n
            if inner.exists("final"):
                assert (store.struck.name, mode) == ("rename", "after")
        if inner.exists("final"):
            assert inner.read("final/chunk", 8) == b"abcdefgh"
        if store.struck is None:
            break
    assert n == 10


@pytest.mark.parametrize(
    ("mode", "torn", "left"),
    [
        ("before", "half", None),
        ("after", "half", b"0123456789"),
        ("torn", "half", b"01234"),
        ("torn", "first byte", b"0"),
        ("torn", "all but last byte", b"012345678"),
    ],
)
def test_a_torn_creation_leaves_a_part(inner, mode, torn, left):
    with pytest.raises(NoSpace, match=r"\[injected\] create file: No space left"):
        FaultyStore(inner, FailAt(1, errno=errno.ENOSPC, mode=mode, torn=torn)).create("file", b"0123456789")
    if left is None:
        assert not inner.exists("file")
    else:
        assert inner.read("file", 10) == left


def test_a_torn_range_leaves_the_rest_as_it_was(inner):
    writer = FaultyStore(inner, FailAt(2, mode="torn")).open_writer("file", 6)
    with pytest.raises(StorageFailed):
        writer.write(1, memoryview(b"abcd"))
    assert inner.read("file", 6) == b"\0ab\0\0\0"


def test_a_torn_opening_leaves_a_file_without_its_size_and_one_that_was_there_alone(inner):
    inner.create("old", b"content")
    for path in ("new", "old"):
        with pytest.raises(StorageFailed):
            FaultyStore(inner, FailAt(1, mode="torn")).open_writer(path, 7)
    assert (inner.size("new"), inner.read("old", 7)) == (0, b"content")


def test_a_torn_removal_leaves_a_part(inner):
    inner.make_directories("d")
    for name in "abc":
        inner.create(f"d/{name}", b"")
    with pytest.raises(StorageFailed):
        FaultyStore(inner, FailAt(1, mode="torn")).remove_tree("d")
    assert [entry.name for entry in inner.entries("d")] == ["c"]


def test_a_fault_happens_once_or_from_then_on(inner):
    once, on = FaultyStore(inner, FailAt(1)), FaultyStore(inner, FailAt(1, lasting="from then on"))
    for store, later in ((once, True), (on, False)):
        with pytest.raises(StorageFailed):
            store.exists("file")
        if later:
            assert store.exists("file") is False
        else:
            with pytest.raises(StorageFailed):
                store.exists("file")


def test_nothing_reaches_the_store_after_a_crash_and_descriptors_are_given_back(tmp_path):
    store = FaultyStore(LocalStore(tmp_path), CrashAt(3), counted=CHANGING)
    before = len(os.listdir("/proc/self/fd"))
    writer = store.open_writer("file", 3)
    writer.write(0, memoryview(b"a"))
    with pytest.raises(Crash):
        writer.write(1, memoryview(b"b"))
    for operation in (lambda: writer.write(2, memoryview(b"c")), writer.sync, writer.close, lambda: store.size("file")):
        with pytest.raises(Crash):
            operation()
    assert (tmp_path / "file").read_bytes() == b"a\0\0"
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the store's own, of its root


def test_a_crash_is_seen_by_no_handler_of_errors():
    assert not issubclass(Crash, Exception)


def test_only_counted_operations_count(inner):
    store = FaultyStore(inner, FailAt(2), counted=frozenset({"create"}))
    for _ in range(5):
        store.exists("file")
    store.create("first", b"")
    with pytest.raises(StorageFailed):
        store.create("second", b"")
    assert store.struck.path == "second"
    assert ALL > CHANGING


def test_operations_of_threads_are_counted_once_each(inner):
    store = FaultyStore(inner, FailAt(500))

    def look(_):
        try:
            return store.exists("file")
        except StorageFailed:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(look, range(1000))).count(None) == 1


def test_errors_of_the_inner_store_pass(inner):
    with pytest.raises(MissingFile):
        FaultyStore(inner, FailAt(9)).size("absent")


def test_a_hook_sees_the_operation_and_lets_it_go_on(inner):
    seen = []
    store = FaultyStore(inner, CallAt(2, seen.append))
    store.create("a", b"")
    store.create("b", b"")
    assert [operation.path for operation in seen] == ["b"]
    assert inner.exists("b")


@pytest.mark.parametrize(("mode", "left"), [("before", None), ("torn", b"01"), ("after", b"0123")])
def test_a_hook_may_kill_the_process_in_the_middle(tmp_path, mode, left):
    child = os.fork()
    if child == 0:
        kill = CallAt(1, lambda operation: os.kill(os.getpid(), signal.SIGKILL), mode=mode)
        FaultyStore(LocalStore(tmp_path), kill).create("file", b"0123")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert ((tmp_path / "file").read_bytes() if (tmp_path / "file").exists() else None) == left
