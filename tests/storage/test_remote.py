"""fsspec file systems as stores, each with the capabilities that its protocol really has."""

from __future__ import annotations

import uuid

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from elastickpt.errors import CapabilityMissing, StorageFailed
from elastickpt.storage.opening import open_store
from elastickpt.storage.remote import FsspecStore
from elastickpt.testing.store_suite import StoreSuite


class Plain(MemoryFileSystem):
    """A protocol of which nothing is known."""

    protocol = "plain"


class Failing(MemoryFileSystem):
    """A client library whose errors are no OSErrors."""

    def info(self, path, **named):
        raise RuntimeError("the service is down")


class TestFsspecLocal(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path):
        return FsspecStore(f"local://{tmp_path}")


class TestFsspecMemory(StoreSuite):
    @pytest.fixture
    def store(self):
        return FsspecStore(f"memory://{uuid.uuid4().hex}", filesystem=fsspec.filesystem("memory"))

    def test_its_url_opens_it_again(self, store):
        """It does not: `memory://` is our own store, and fsspec's is opened by its class only."""
        assert open_store(store.url).capabilities.ranged_writes


def test_a_protocol_without_exclusive_creation_creates_nothing():
    store = FsspecStore("plain://folder", filesystem=Plain())
    assert not store.capabilities.exclusive_create
    with pytest.raises(CapabilityMissing, match="exclusive_create: plain"):
        store.create("file", b"")
    assert not store.exists("file")


@pytest.mark.parametrize(("protocol", "conditional"), [("s3", True), ("gs", True), ("memory", False), ("plain", False)])
def test_a_conditional_put_is_declared_by_protocol(protocol, conditional):
    filesystem = type("Some", (MemoryFileSystem,), {"protocol": protocol})()
    capabilities = FsspecStore(f"{protocol}://folder", filesystem=filesystem).capabilities
    assert (capabilities.name, capabilities.conditional_put) == (protocol, conditional)
    assert {capabilities.ranged_writes, capabilities.directory_sync, capabilities.shared_by_hosts} == {False}


def test_errors_of_a_client_library_name_operation_and_path():
    store = FsspecStore("memory://folder", filesystem=Failing())
    with pytest.raises(StorageFailed, match=r"open to read /folder/file: RuntimeError: the service is down"):
        store.size("file")


def test_an_unknown_protocol_is_an_error_of_ours():
    with pytest.raises(StorageFailed, match="nosuch://a"):
        FsspecStore("nosuch://a")
