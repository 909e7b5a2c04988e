"""What every store passes about directories, renaming and removing. Part of `store_suite`."""

from __future__ import annotations

import pytest

from elastickpt.errors import (
    CheckpointError,
    MissingFile,
    PathOccupied,
)
from elastickpt.ranks.threads import Pool
from elastickpt.storage.store import Entry, Store
from elastickpt.testing.lacking import lacks


class NameSuite:
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
        if lacks(store, capability="directory_sync", operation=lambda: store.sync_directory("d")):
            return
        store.sync_directory("d")
        store.sync_directory("")

    def test_the_tree_is_synced_or_the_lack_is_named(self, store: Store) -> None:
        store.create("file", b"")
        if not lacks(store, capability="tree_sync", operation=store.sync_tree):
            store.sync_tree()

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

        winners: list[int] = []

        def rename(index: int) -> None:
            try:
                store.rename(f"draft-{index}", "final")
            except PathOccupied:
                return
            winners.append(index)

        with Pool("elastickpt-suite", 8) as pool:
            pool.share_out(range(8), rename)
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
        with Pool("elastickpt-suite", 4) as pool:
            pool.share_out(["d"] * 4, store.remove_tree)
        assert not store.exists("d")
