"""What every store passes about whole files. Part of `store_suite`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastickpt.errors import (
    LimitExceeded,
    MissingFile,
    PathOccupied,
    Unsafe,
)
from elastickpt.ranks.threads import Pool
from elastickpt.storage.opening import open_store
from elastickpt.storage.store import Entry, Store

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


class FileSuite:
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
        winners: list[int] = []

        def create(index: int) -> None:
            try:
                store.create("file", bytes([index]) * 1000)
            except PathOccupied:
                return
            winners.append(index)

        with Pool("elastickpt-suite", 8) as pool:
            pool.share_out(range(8), create)
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
            with pytest.raises(Unsafe):
                _OPERATIONS[operation](store, path)
        assert store.entries("") == ()

    def test_its_url_opens_it_again(self, store: Store) -> None:
        store.create("file", b"content")
        again = open_store(store.url)
        assert again.read("file", 7) == b"content"
        assert again.capabilities == store.capabilities
