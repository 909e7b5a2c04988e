"""Memory stores: one tree for the process, so that a name is the same store wherever it is opened."""

from __future__ import annotations

import uuid

import pytest

from elastickpt.errors import PathOccupied
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.opening import open_store
from elastickpt.testing.store_suite import StoreSuite


@pytest.fixture
def name():
    return f"test-{uuid.uuid4().hex}"


class TestInMemory(StoreSuite):
    @pytest.fixture
    def store(self, name):
        return MemoryStore(name)


def test_a_name_is_one_store_wherever_it_is_opened(name):
    MemoryStore(name).create("file", b"content")
    assert open_store(f"memory://{name}").read("file", 7) == b"content"
    assert open_store(f"memory://{name}-other").entries("") == ()


def test_a_store_may_stand_inside_another(name):
    inner = MemoryStore(f"{name}/a/b")
    inner.create("file", b"content")
    assert MemoryStore(name).read("a/b/file", 7) == b"content"


def test_no_store_stands_on_a_file(name):
    MemoryStore(name).create("file", b"")
    with pytest.raises(PathOccupied, match="file"):
        MemoryStore(f"{name}/file/below")


def test_no_directory_moves_into_itself(name):
    store = MemoryStore(name)
    store.make_directories("d")
    with pytest.raises(PathOccupied, match="into itself"):
        store.rename("d", "d/below")
    assert store.exists("d")
