"""The suite that every store passes. Subclass `StoreSuite` as a pytest class and override its fixture `store`.

    class TestMyStore(StoreSuite):
        @pytest.fixture
        def store(self, tmp_path):
            return MyStore(...)          # empty

Where a store declares that it lacks a capability, the tests that need it demand CapabilityMissing by that name instead.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from elastickpt.errors import (
    CapabilityMissing,
    CheckpointError,
    LimitExceeded,
    MissingFile,
    PathOccupied,
    Unsafe,
    WrongLength,
)
from elastickpt.storage.direct import aligned_buffer
from elastickpt.storage.opening import open_store
from elastickpt.storage.store import Entry, Store

MIB = 1 << 20
UNSAFE_PATHS = ("/etc/passwd", "..", "a/..", "a/../b", "a//b", "a/", ".", "./a", "a/./b", "a\0b", "/")

_OPERATIONS: dict[str, Callable[[Store, str], object]] = {
    "make_directories": lambda store, path: store.make_directories(path),
    "create": lambda store, path: store.create(path, b""),
    "open_writer": lambda store, path: store.open_writer(path, 0),
    "open_reader": lambda store, path: store.open_reader(path),
    "read": lambda store, path: store.read(path, 1),
    "size": lambda store, path: store.size(path),
    "sync_file": lambda store, path: store.sync_file(path),
    "sync_directory": lambda store, path: store.sync_directory(path),
    "rename from": lambda store, path: store.rename(path, "target"),
    "rename to": lambda store, path: store.rename("source", path),
    "remove": lambda store, path: store.remove(path),
    "remove_tree": lambda store, path: store.remove_tree(path),
    "entries": lambda store, path: store.entries(path),
    "exists": lambda store, path: store.exists(path),
}


def lacks(store: Store, *, capability: str, operation: Callable[[], object]) -> bool:
    """Whether the store lacks the capability; if so, `operation` has raised CapabilityMissing with its name."""
    if getattr(store.capabilities, capability):
        return False
    with pytest.raises(CapabilityMissing, match=capability):
        operation()
    return True


def write(store: Store, path: str, *ranges: tuple[int, bytes], nbytes: int) -> None:
    with closing(store.open_writer(path, nbytes)) as writer:
        for offset, data in ranges:
            writer.write(offset, memoryview(data))
        writer.sync()


class StoreSuite:
    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError("override the fixture `store`: a new, empty store")

    # Whole files

    def test_a_created_file_has_its_content_and_size(self, store: Store) -> None:
        store.make_directories("d")
        store.create("d/file", b"content")
        store.sync_file("d/file")
        assert store.read("d/file", 7) == b"content"
        assert store.size("d/file") == 7
        assert store.exists("d/file")

    def test_an_empty_file_is_a_file(self, store: Store) -> None:
        store.create("file", b"")
        assert store.read("file", 0) == b""
        assert store.entries("") == (Entry("file", "file", 0),)

    def test_creating_what_exists_is_refused_and_changes_nothing(self, store: Store) -> None:
        store.create("file", b"first")
        with pytest.raises(PathOccupied, match="file"):
            store.create("file", b"second")
        assert store.read("file", 100) == b"first"

    def test_creating_where_a_directory_stands_is_refused(self, store: Store) -> None:
        store.make_directories("d")
        store.create("d/below", b"")
        with pytest.raises(PathOccupied):
            store.create("d", b"")
        assert store.exists("d/below")

    def test_of_many_creators_exactly_one_succeeds(self, store: Store) -> None:
        def create(index: int) -> int | None:
            try:
                store.create("file", bytes([index]) * 1000)
            except PathOccupied:
                return None
            return index

        with ThreadPoolExecutor(8) as pool:
            winners = [index for index in pool.map(create, range(8)) if index is not None]
        assert [store.read("file", 1000)] == [bytes([index]) * 1000 for index in winners]

    def test_names_may_hold_any_character_but_a_slash(self, store: Store) -> None:
        names = sorted(["a b", "ü", "%2F", "c.0.0", "..a", "a..", "#?&", "W", "w", "x" * 200])
        store.make_directories("d")
        for name in names:
            store.create(f"d/{name}", name.encode())
        assert [entry.name for entry in store.entries("d")] == names
        assert [store.read(f"d/{name}", 1000).decode() for name in names] == names

    def test_a_file_beyond_the_limit_is_not_read(self, store: Store) -> None:
        store.create("file", b"12345")
        with pytest.raises(LimitExceeded, match="at most 4 bytes, found 5"):
            store.read("file", 4)

    @pytest.mark.parametrize("operation", ["open_reader", "read", "size", "sync_file"])
    def test_a_file_that_is_not_there_is_named(self, store: Store, operation: str) -> None:
        store.make_directories("d")
        for path in ("absent", "d/absent", "d", "no/such/folder"):
            with pytest.raises(MissingFile, match=path):
                _OPERATIONS[operation](store, path)

    @pytest.mark.parametrize("operation", _OPERATIONS)
    def test_a_path_that_leads_out_of_the_store_is_unsafe(self, store: Store, operation: str) -> None:
        for path in UNSAFE_PATHS:
            with pytest.raises((Unsafe, CapabilityMissing)):
                _OPERATIONS[operation](store, path)
        assert store.entries("") == ()

    # Ranges

    def test_a_new_file_has_its_size_and_reads_as_zero(self, store: Store) -> None:
        if lacks(store, capability="ranged_writes", operation=lambda: store.open_writer("file", 10)):
            return
        write(store, "file", (3, b"abc"), nbytes=10)
        assert store.read("file", 10) == b"\0\0\0abc\0\0\0\0"

    def test_opening_a_writer_again_keeps_what_was_written(self, store: Store) -> None:
        if lacks(store, capability="ranged_writes", operation=lambda: store.open_writer("file", 10)):
            return
        write(store, "file", (0, b"abc"), nbytes=6)
        write(store, "file", (3, b"def"), nbytes=6)
        assert store.read("file", 6) == b"abcdef"

    def test_opening_a_writer_sets_the_size(self, store: Store) -> None:
        if lacks(store, capability="ranged_writes", operation=lambda: store.open_writer("file", 10)):
            return
        write(store, "file", (0, b"abcdef"), nbytes=6)
        write(store, "file", nbytes=3)
        assert store.read("file", 6) == b"abc"

    @pytest.mark.parametrize("shift", [0, 1, 513])
    def test_large_ranges_arrive_whole_however_memory_and_file_are_aligned(self, store: Store, shift: int) -> None:
        if lacks(store, capability="ranged_writes", operation=lambda: store.open_writer("file", 10)):
            return
        memory = aligned_buffer(5 * MIB)
        memory[:] = np.random.default_rng(0).integers(0, 256, len(memory))
        whole, seam = memoryview(memory), 2 * MIB + 77
        one, two = (store.open_writer("file", len(whole)) for _ in range(2))
        with closing(one), closing(two):
            one.write(0, whole[:seam])
            two.write(seam, memoryview(memory.copy())[seam:])
            one.write(MIB, whole[MIB + shift : 2 * MIB + shift])
            one.write(MIB, whole[MIB : 2 * MIB])
            one.sync()
            two.sync()
        assert store.read("file", len(whole)) == whole.tobytes()
        into = aligned_buffer(3 * MIB)
        with closing(store.open_reader("file")) as reader:
            reader.read_into(shift, memoryview(into))
        assert into.tobytes() == whole[shift : shift + 3 * MIB].tobytes()

    def test_views_of_any_element_type_and_shape_are_bytes(self, store: Store) -> None:
        values = np.arange(6, dtype="<f4").reshape(2, 3)
        store.create("created", values.tobytes())
        into = np.zeros((2, 3), dtype="<f4")
        with closing(store.open_reader("created")) as reader:
            reader.read_into(0, memoryview(into))
        assert into.tolist() == values.tolist()
        if not store.capabilities.ranged_writes:
            return
        with closing(store.open_writer("written", 24)) as writer:
            writer.write(0, memoryview(values))
        assert store.read("written", 24) == values.tobytes()

    def test_threads_write_disjoint_ranges_through_one_writer(self, store: Store) -> None:
        if lacks(store, capability="ranged_writes", operation=lambda: store.open_writer("file", 10)):
            return
        whole = np.random.default_rng(1).integers(0, 256, 100_003, dtype=np.uint8).tobytes()
        with closing(store.open_writer("file", len(whole))) as writer, ThreadPoolExecutor(8) as pool:
            starts = range(0, len(whole), 997)
            list(pool.map(lambda start: writer.write(start, memoryview(whole)[start : start + 997]), starts))
        assert store.read("file", len(whole)) == whole

    def test_a_reader_fills_any_range(self, store: Store) -> None:
        store.create("file", bytes(range(100)))
        with closing(store.open_reader("file")) as reader:
            assert reader.nbytes == 100
            for start, stop in ((0, 100), (10, 20), (99, 100), (100, 100), (0, 0)):
                into = bytearray(stop - start)
                reader.read_into(start, memoryview(into))
                assert into == bytes(range(start, stop))

    @pytest.mark.parametrize(("offset", "nbytes"), [(0, 11), (5, 6), (10, 1), (1000, 1)])
    def test_a_range_beyond_the_end_says_what_it_expected_and_found(self, store: Store, offset: int, nbytes: int) -> None:
        store.create("file", b"0123456789")
        said = pytest.raises(WrongLength, match=rf"file: expected at least {offset + nbytes} bytes, found 10")
        with closing(store.open_reader("file")) as reader, said:
            reader.read_into(offset, memoryview(bytearray(nbytes)))

    def test_writers_and_readers_may_be_closed_twice(self, store: Store) -> None:
        store.create("file", b"")
        reader = store.open_reader("file")
        reader.close()
        reader.close()
        if not store.capabilities.ranged_writes:
            return
        writer = store.open_writer("file", 0)
        writer.close()
        writer.close()

    def test_a_writer_keeps_its_file_when_the_folder_is_renamed(self, store: Store) -> None:
        if not (store.capabilities.ranged_writes and store.capabilities.no_replace_rename):
            return
        store.make_directories("draft")
        with closing(store.open_writer("draft/file", 3)) as writer:
            store.rename("draft", "final")
            writer.write(0, memoryview(b"abc"))
            writer.sync()
        assert store.read("final/file", 3) == b"abc"
        assert not store.exists("draft")

    # Directories and names

    def test_directories_are_made_with_those_between(self, store: Store) -> None:
        store.make_directories("a")
        store.make_directories("a/b/c")
        store.make_directories("a/b/c")
        store.make_directories("a")
        store.create("a/b/c/file", b"")
        assert store.entries("a/b") == (Entry("c", "directory", 0),)

    def test_the_first_component_is_never_made_on_the_way(self, store: Store) -> None:
        """A late rank that still writes into a swept draft must not bring it back."""
        if not store.capabilities.directories:
            return
        with pytest.raises(MissingFile):
            store.make_directories("swept/params")
        with pytest.raises(MissingFile):
            store.create("swept/file", b"")
        if store.capabilities.ranged_writes:
            with pytest.raises(MissingFile):
                store.open_writer("swept/file", 1)
        assert not store.exists("swept")

    def test_no_directory_is_made_where_a_file_stands(self, store: Store) -> None:
        if not store.capabilities.directories:
            return
        store.create("file", b"1")
        store.make_directories("d")
        store.create("d/file", b"2")
        for path in ("file", "file/below", "d/file", "d/file/below"):
            with pytest.raises(PathOccupied):
                store.make_directories(path)
        assert (store.read("file", 1), store.read("d/file", 1)) == (b"1", b"2")

    def test_no_writer_is_opened_on_a_directory(self, store: Store) -> None:
        store.make_directories("d")
        if lacks(store, capability="ranged_writes", operation=lambda: store.open_writer("d", 1)):
            return
        with pytest.raises(PathOccupied):
            store.open_writer("d", 1)

    def test_entries_are_ordered_by_name_with_kind_and_size(self, store: Store) -> None:
        store.make_directories("top")
        store.make_directories("top/d")
        store.create("top/d/below", b"")
        store.create("top/b", b"22")
        store.create("top/a", b"1")
        expected = (Entry("a", "file", 1), Entry("b", "file", 2), Entry("d", "directory", 0))
        assert store.entries("top") == expected
        assert store.entries("") == (Entry("top", "directory", 0),)

    def test_listing_what_is_not_there_is_an_error(self, store: Store) -> None:
        with pytest.raises(MissingFile, match="absent"):
            store.entries("absent")

    def test_directories_are_synced_or_the_lack_is_named(self, store: Store) -> None:
        store.make_directories("d")
        store.create("d/file", b"")
        for path in ("", "d"):
            if not lacks(store, capability="directory_sync", operation=lambda path=path: store.sync_directory(path)):
                store.sync_directory(path)

    def test_the_tree_is_synced_or_the_lack_is_named(self, store: Store) -> None:
        store.create("file", b"")
        if not lacks(store, capability="tree_sync", operation=store.sync_tree):
            store.sync_tree()

    # Renaming and removing

    def test_a_renamed_directory_takes_all_with_it(self, store: Store) -> None:
        store.make_directories("old")
        store.make_directories("old/d")
        store.create("old/d/file", b"x")
        if lacks(store, capability="no_replace_rename", operation=lambda: store.rename("old", "new")):
            return
        store.rename("old", "new")
        assert store.entries("") == (Entry("new", "directory", 0),)
        assert store.read("new/d/file", 1) == b"x"

    def test_renaming_replaces_an_empty_directory_only(self, store: Store) -> None:
        if not store.capabilities.no_replace_rename:
            return
        for folder in ("old", "empty", "full"):
            store.make_directories(folder)
        store.create("old/file", b"old")
        store.create("full/file", b"full")
        store.create("file", b"file")
        for target in ("full", "file"):
            with pytest.raises(PathOccupied, match=target):
                store.rename("old", target)
        assert (store.read("old/file", 9), store.read("full/file", 9)) == (b"old", b"full")
        store.rename("old", "empty")
        assert store.read("empty/file", 9) == b"old"

    def test_renaming_a_file_replaces_nothing(self, store: Store) -> None:
        store.create("old", b"old")
        store.create("file", b"file")
        store.make_directories("d")
        if lacks(store, capability="no_replace_rename", operation=lambda: store.rename("old", "new")):
            return
        for target in ("file", "d"):
            with pytest.raises(PathOccupied, match=target):
                store.rename("old", target)
        assert (store.read("old", 9), store.read("file", 9)) == (b"old", b"file")
        store.rename("old", "new")
        assert not store.exists("old")
        assert store.read("new", 9) == b"old"

    def test_renaming_what_is_not_there_is_an_error(self, store: Store) -> None:
        store.make_directories("d")
        if lacks(store, capability="no_replace_rename", operation=lambda: store.rename("absent", "new")):
            return
        for source, target in (("absent", "new"), ("d", "absent/new")):
            with pytest.raises(MissingFile, match="absent"):
                store.rename(source, target)
        assert store.exists("d")

    def test_of_many_renames_onto_one_name_exactly_one_succeeds(self, store: Store) -> None:
        if not store.capabilities.no_replace_rename:
            return
        for index in range(8):
            store.make_directories(f"draft-{index}")
            store.create(f"draft-{index}/token", bytes([index]))

        def rename(index: int) -> int | None:
            try:
                store.rename(f"draft-{index}", "final")
            except PathOccupied:
                return None
            return index

        with ThreadPoolExecutor(8) as pool:
            winners = [index for index in pool.map(rename, range(8)) if index is not None]
        assert [store.read("final/token", 1)] == [bytes([index]) for index in winners]
        assert len(store.entries("")) == 8

    def test_removing_twice_is_no_error(self, store: Store) -> None:
        store.create("file", b"")
        store.remove("file")
        store.remove("file")
        store.remove("no/such/folder")
        assert not store.exists("file")

    def test_remove_takes_no_directory(self, store: Store) -> None:
        store.make_directories("d")
        store.create("d/file", b"")
        if store.capabilities.directories:
            with pytest.raises(CheckpointError):
                store.remove("d")
        assert store.exists("d/file")

    def test_a_tree_is_removed_whole_and_alone(self, store: Store) -> None:
        store.make_directories("d")
        store.make_directories("d/e/f")
        store.create("d/e/f/file", b"")
        store.create("d/file", b"")
        store.create("d-beside", b"")
        store.remove_tree("d")
        store.remove_tree("d")
        assert store.entries("") == (Entry("d-beside", "file", 0),)
        store.remove_tree("d-beside")
        assert not store.exists("d-beside")

    def test_a_tree_may_be_removed_by_several_at_once(self, store: Store) -> None:
        store.make_directories("d")
        for index in range(64):
            store.make_directories(f"d/{index % 8}")
            store.create(f"d/{index % 8}/{index}", b"")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(store.remove_tree, ["d"] * 4))
        assert not store.exists("d")

    def test_its_url_opens_it_again(self, store: Store) -> None:
        store.create("file", b"content")
        again = open_store(store.url)
        assert again.read("file", 7) == b"content"
        assert again.capabilities == store.capabilities
