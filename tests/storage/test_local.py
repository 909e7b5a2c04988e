"""What only the local file system has: links, descriptors, the page cache and the way around it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from elastickpt.errors import CapabilityMissing, MissingFile, NoSpace, PathOccupied, ReadOnly, StorageFailed, Unsafe
from elastickpt.format.memory_views import address_of
from elastickpt.storage import kernel, local, ranges
from elastickpt.storage.kernel import aligned_buffer
from elastickpt.storage.local import LocalStore
from elastickpt.storage.store import Entry
from elastickpt.testing.store_suite import StoreSuite

MIB = 1 << 20
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


class TestOnDisk(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path):
        return LocalStore(tmp_path)


@pytest.mark.skipif(
    not SHARED_MEMORY.is_dir() or kernel.file_system(str(SHARED_MEMORY)) != "tmpfs", reason="needs a tmpfs at /dev/shm"
)
class TestOnTmpfs(StoreSuite):
    @pytest.fixture
    def store(self):
        folder = tempfile.mkdtemp(dir=SHARED_MEMORY)
        yield LocalStore(folder)
        shutil.rmtree(folder)


class Calls:
    """An `os` function that records which descriptors were direct, may take fewer bytes, or fail on some of them."""

    def __init__(self, function, *, fails_on=lambda descriptor: False, error=errno.EINVAL, at_most=None):
        self.function, self.fails_on, self.error, self.at_most = function, fails_on, error, at_most
        self.directs = []

    def __call__(self, descriptor, *rest):
        self.directs.append(is_direct(descriptor))
        if self.fails_on(descriptor):
            raise OSError(self.error, os.strerror(self.error))
        if self.at_most is not None:
            first = rest[0]
            cut = [first[0][: self.at_most]] if isinstance(first, list) else first[: self.at_most]
            rest = (cut, *rest[1:])
        return self.function(descriptor, *rest)


def is_direct(descriptor):
    flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


def bytes_in(nbytes):
    memory = aligned_buffer(nbytes)
    memory[:] = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
    return memoryview(memory)


@pytest.fixture
def on_direct_disk(tmp_path):
    with tempfile.NamedTemporaryFile(dir=tmp_path) as file:
        if kernel.file_system(str(tmp_path)) in kernel.IN_MEMORY or not kernel.direct_alignment(file.fileno()):
            pytest.skip(f"needs O_DIRECT, which {kernel.file_system(str(tmp_path))} at the temporary folder has not")


# Past the page cache


def test_the_inside_of_a_large_aligned_range_is_written_direct_and_its_edges_are_not(store, monkeypatch, on_direct_disk):
    calls = Calls(os.pwrite)
    monkeypatch.setattr(ranges.os, "pwrite", calls)
    data = bytes_in(4 * MIB)
    with closing(store.open_writer("file", 4 * MIB)) as writer:
        writer.write(100, data[100 : 3 * MIB + 7])
    assert calls.directs == [False, True, False]
    assert store.read("file", 4 * MIB)[: 3 * MIB + 7] == bytes(100) + data[100 : 3 * MIB + 7].tobytes()


@pytest.mark.parametrize(("address", "nbytes"), [(1, 2 * MIB), (0, MIB - 1), (0, 1000)])
def test_small_and_unaligned_ranges_go_through_the_cache(store, monkeypatch, address, nbytes):
    calls = Calls(os.pwrite)
    monkeypatch.setattr(ranges.os, "pwrite", calls)
    data = bytes_in(3 * MIB)[address : address + nbytes]
    with closing(store.open_writer("file", nbytes)) as writer:
        writer.write(0, data)
    assert set(calls.directs) == {False}
    assert store.read("file", nbytes) == data.tobytes()


def test_a_range_goes_through_the_cache_where_o_direct_cannot_be_opened(store, monkeypatch, on_direct_disk):
    real = os.open

    def refuse_direct(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(kernel.os, "open", refuse_direct)
    data = bytes_in(2 * MIB)
    with closing(store.open_writer("file", 2 * MIB)) as writer:
        writer.write(0, data)
    assert store.read("file", 2 * MIB) == data.tobytes()


def test_a_refused_direct_write_is_done_through_the_cache_and_not_tried_again(store, monkeypatch, on_direct_disk):
    calls = Calls(os.pwrite, fails_on=is_direct)
    monkeypatch.setattr(ranges.os, "pwrite", calls)
    data = bytes_in(4 * MIB)
    with closing(store.open_writer("file", 4 * MIB)) as writer:
        writer.write(0, data[: 2 * MIB])
        writer.write(2 * MIB, data[2 * MIB :])
    assert calls.directs == [True, False, False]
    assert store.read("file", 4 * MIB) == data.tobytes()


def test_a_direct_write_that_fails_otherwise_is_an_error(store, monkeypatch, on_direct_disk):
    monkeypatch.setattr(ranges.os, "pwrite", Calls(os.pwrite, fails_on=is_direct, error=errno.EIO))
    with closing(store.open_writer("file", 2 * MIB)) as writer, pytest.raises(StorageFailed, match=r"write .*file"):
        writer.write(0, bytes_in(2 * MIB))


@pytest.mark.parametrize("at_most", [4096 * 3, MIB + 512, 700_001])
def test_short_writes_and_reads_are_continued(store, monkeypatch, at_most):
    data = bytes_in(3 * MIB)
    monkeypatch.setattr(ranges.os, "pwrite", Calls(os.pwrite, at_most=at_most))
    monkeypatch.setattr(ranges.os, "preadv", Calls(os.preadv, at_most=at_most))
    with closing(store.open_writer("file", 3 * MIB)) as writer:
        writer.write(0, data)
    assert store.read("file", 3 * MIB) == data.tobytes()


def test_no_direct_descriptor_is_taken_of_another_file_with_the_name(tmp_path):
    """The draft may have been renamed away, and another one put in its place, since the writer was opened."""
    store = LocalStore(tmp_path)
    with closing(store.open_writer("file", 2 * MIB)) as writer:
        (tmp_path / "file").rename(tmp_path / "moved")
        store.create("file", b"another")
        writer.write(0, bytes_in(2 * MIB))
    assert store.read("file", 100) == b"another"
    assert store.read("moved", 2 * MIB) == bytes_in(2 * MIB).tobytes()


def test_aligned_memory_starts_at_a_page_and_is_zero():
    memory = aligned_buffer(12_345)
    assert address_of(memoryview(memory)) % kernel.PAGE == 0
    assert (memory.shape, memory.any(), memory.flags.writeable) == ((12_345,), False, True)


@pytest.mark.parametrize("nbytes", [0, 1, MIB - 1, MIB, MIB + 4095, 3 * MIB])
@pytest.mark.parametrize(("offset", "shift"), [(0, 0), (1, 1), (4095, 4095), (4096, 0), (5000, 904), (1, 0), (0, 8)])
def test_the_aligned_inside_is_aligned_in_memory_and_file_and_within_the_range(offset, shift, nbytes):
    view = memoryview(aligned_buffer(4 * MIB))[shift : shift + nbytes]
    start, stop = kernel.aligned_inside(offset, view, alignment=4096)
    if (offset - shift) % 4096 or nbytes < MIB:
        assert (start, stop) == (0, 0)
    elif stop:
        assert 0 <= start < 4096
        assert 0 <= nbytes - stop < 4096
        assert (offset + start) % 4096 == (offset + stop) % 4096 == (shift + start) % 4096 == 0


# Durability


def test_sync_uses_the_descriptor_that_was_open_before_the_first_write(store, monkeypatch, on_direct_disk):
    synced = []
    monkeypatch.setattr(ranges.os, "fdatasync", lambda descriptor: synced.append(is_direct(descriptor)))
    with closing(store.open_writer("file", 2 * MIB)) as writer:
        writer.write(0, bytes_in(2 * MIB))
        writer.sync()
    assert synced == [False]


def test_a_failed_sync_is_never_tried_again(store, monkeypatch):
    """The kernel drops what it could not write: the second sync of the same descriptor reports success. [SAVE-2]"""
    tries = []

    def fail_once(descriptor):
        tries.append(descriptor)
        if len(tries) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ranges.os, "fdatasync", fail_once)
    writer = store.open_writer("file", 1)
    for _ in range(3):
        with pytest.raises(StorageFailed, match=r"sync .*file: Input/output error"):
            writer.sync()
    assert len(tries) == 1
    writer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(tries[0])


def test_a_close_that_fails_is_reported(store, monkeypatch):
    writer = store.open_writer("file", 1)

    def fail(descriptor):
        os.dup2(descriptor, descriptor)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patched:
        patched.setattr(ranges.os, "close", fail)
        with pytest.raises(NoSpace, match="close"):
            writer.close()


def test_the_tree_is_synced_on_a_descriptor_that_was_open_before_the_first_write(store, monkeypatch):
    synced = []
    monkeypatch.setattr(local, "sync_file_system", synced.append)
    store.create("file", b"")
    before = set(os.listdir("/proc/self/fd"))
    store.sync_tree()
    assert {str(descriptor) for descriptor in synced} <= before


def test_a_forked_child_anchors_its_own_descriptor(store, monkeypatch):
    """The kernel reports a failed write-back once to each opening of the root, not to each process."""
    store.create("file", b"")
    parents = store._anchor()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert store._anchor() != parents


def test_a_tree_sync_that_would_not_report_failures_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "syncfs_reports", lambda: False)
    with pytest.raises(CapabilityMissing, match="tree_sync"):
        LocalStore(tmp_path).sync_tree()


def test_a_store_gives_its_descriptor_back(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        LocalStore(tmp_path).make_directories("d")
    assert len(os.listdir("/proc/self/fd")) == before


# Links, devices, rights


def test_no_link_is_followed(store, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(outside)
    (root / "dangling").symlink_to(tmp_path / "absent")
    store = LocalStore(root)
    for operation in (store.open_reader, store.size, store.sync_file, lambda path: store.open_writer(path, 1)):
        with pytest.raises(Unsafe, match="link"):
            operation("link")
    for name in ("link", "dangling"):
        with pytest.raises(PathOccupied):
            store.create(name, b"x")
    assert store.entries("") == (Entry("dangling", "other", 0), Entry("link", "other", 0))
    assert outside.read_bytes() == b"secret"
    assert not (tmp_path / "absent").exists()


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"kept")
    (tmp_path / "root" / "tree").mkdir(parents=True)
    (tmp_path / "root" / "tree" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    store = LocalStore(tmp_path / "root")
    store.remove_tree("tree")
    store.remove_tree("link")
    assert store.entries("") == ()
    assert (tmp_path / "outside" / "file").read_bytes() == b"kept"


def test_a_pipe_is_refused_without_waiting_for_its_other_end(store, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Unsafe, match="pipe"):
        store.open_reader("pipe")
    with pytest.raises(Unsafe):
        store.open_writer("pipe", 1)


@pytest.mark.parametrize(
    ("number", "cls"),
    [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EROFS, ReadOnly), (errno.EIO, StorageFailed)],
)
def test_what_the_system_says_becomes_an_error_with_operation_and_path(store, monkeypatch, number, cls):
    monkeypatch.setattr(ranges.os, "pwrite", Calls(os.pwrite, fails_on=lambda _: True, error=number))
    with closing(store.open_writer("file", 1)) as writer, pytest.raises(StorageFailed) as raised:
        writer.write(0, memoryview(b"x"))
    assert type(raised.value) is cls
    assert raised.value.message == f"write {store._root}/file: {os.strerror(number)}"


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom rights bind")
def test_a_folder_that_cannot_be_written_is_read_only(store, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ReadOnly, match="create"):
        store.create("file", b"")


def test_a_root_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for name in ("absent", "file"):
        with pytest.raises(MissingFile, match=name):
            LocalStore(tmp_path / name)


@pytest.mark.parametrize(("name", "shared"), [("lustre", True), ("gpfs", True), ("nfs", False), ("fuse", False)])
def test_only_listed_file_systems_are_shared_by_hosts(tmp_path, monkeypatch, name, shared):
    monkeypatch.setattr(local, "file_system", lambda path: name)
    capabilities = LocalStore(tmp_path).capabilities
    assert (capabilities.name, capabilities.shared_by_hosts, capabilities.tree_sync) == (name, shared, False)


def test_a_folder_made_by_chance_has_its_name_and_replaces_nothing(tmp_path):
    made = str(tmp_path / "params")
    assert kernel.make_spread(made)
    (tmp_path / "params" / "file").write_bytes(b"x")
    assert not kernel.make_spread(made)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["params", "params/file"]


def test_only_who_made_the_top_folder_makes_folders_in_it_by_chance(tmp_path, monkeypatch):
    """Whoever dies between the two calls leaves a folder behind: so it must not be a writer of a draft that lives on."""
    monkeypatch.setattr(local, "file_system", lambda path: "ext4")
    monkeypatch.setattr(local, "spread_below", lambda path: None)
    asked = []
    monkeypatch.setattr(local, "make_spread", lambda path: bool(asked.append(Path(path).name)))
    maker, other = LocalStore(tmp_path), LocalStore(tmp_path)
    maker.make_directories("draft")
    for store in (other, maker):
        for path in ("draft", f"draft/{id(store)}", f"draft/{id(store)}", "draft/params/deep"):
            store.make_directories(path)
    assert asked == [str(id(maker))]
    assert sorted(os.listdir(tmp_path / "draft")) == sorted(["params", str(id(maker)), str(id(other))])


@pytest.mark.skipif(
    not SHARED_MEMORY.is_dir() or kernel.file_system(str(SHARED_MEMORY)) != "tmpfs", reason="needs a tmpfs at /dev/shm"
)
def test_memory_is_not_past_the_cache():
    assert not LocalStore(SHARED_MEMORY).capabilities.past_cache
