"""From what people write to a store and a name in it."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.errors import MissingFile, NotACheckpoint, PathOccupied, Refused
from elastickpt.storage.local import LocalStore
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.opening import _parent_and_name, locate, locate_for_saving, open_store, path_in
from elastickpt.storage.remote import FsspecStore


@pytest.mark.parametrize("written", ["{}", "{}/", "file://{}"])
def test_local_paths_and_file_urls_open_the_local_store(tmp_path, written):
    store = open_store(written.format(tmp_path))
    assert isinstance(store, LocalStore)
    assert store.url == tmp_path.as_uri()


def test_a_url_quotes_what_a_path_may_hold(tmp_path):
    folder = tmp_path / "a b%20ü#?"
    folder.mkdir()
    LocalStore(folder).create("file", b"x")
    assert open_store(LocalStore(folder).url).read("file", 1) == b"x"


def test_other_urls_open_their_store():
    assert isinstance(open_store(f"memory://{uuid.uuid4()}"), MemoryStore)
    assert isinstance(open_store("local:///tmp"), FsspecStore)


@pytest.mark.parametrize("url", ["simplecache::s3://bucket/a", "zip://a::file:///b", "file://host/share"])
def test_chained_urls_and_file_urls_with_a_host_are_refused(url):
    with pytest.raises(Refused, match="expected"):
        open_store(url)


@pytest.mark.parametrize("tail", ["step-7", "step-7/", "step-7//", "x/../step-7", "./step-7"])
def test_a_path_is_its_parents_store_and_its_last_name(tmp_path, tail):
    store, name = locate(f"{tmp_path}/{tail}")
    assert (store.url, name) == (tmp_path.as_uri(), "step-7")


def test_paths_are_objects_too_and_relative_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, name = locate(Path("step-7"))
    assert (store.url, name) == (tmp_path.as_uri(), "step-7")


def test_memory_urls_are_split_at_the_last_name():
    top = f"test-{uuid.uuid4()}"
    assert [(store.url, name) for store, name in [locate(f"memory://{top}/a/b/")]] == [(f"memory://{top}/a", "b")]
    assert [(store.url, name) for store, name in [locate(f"memory://{top}")]] == [("memory://", top)]


def test_locating_makes_nothing(tmp_path):
    with pytest.raises(NotACheckpoint, match="a/b"):
        locate(tmp_path / "a" / "b" / "step-7")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MissingFile):
        open_store(str(tmp_path / "a"))


def test_locating_for_saving_makes_the_parents_only(tmp_path):
    store, name = locate_for_saving(tmp_path / "a" / "b" / "step-7")
    assert (store.url, name) == ((tmp_path / "a" / "b").as_uri(), "step-7")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_among_the_parents_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PathOccupied, match="file"):
        locate_for_saving(tmp_path / "file" / "step-7")
    with pytest.raises(NotACheckpoint, match="file"):
        locate(tmp_path / "file" / "step-7")


@pytest.mark.parametrize("path", ["/", "s3://bucket", "memory://"])
def test_the_top_of_a_store_is_no_checkpoint(path):
    with pytest.raises(NotACheckpoint):
        locate(path)
    with pytest.raises(PathOccupied):
        locate_for_saving(path)


@pytest.mark.parametrize("scheme", ["local", "hdfs"])
def test_a_url_without_a_host_is_a_path_from_the_root(scheme):
    assert _parent_and_name(f"{scheme}:///data/runs/c") == (f"{scheme}:///data/runs", "c")
    assert _parent_and_name(f"{scheme}:///c") == (f"{scheme}:///", "c")


def test_a_checkpoint_is_read_through_fsspec_from_any_folder(tmp_path, monkeypatch):
    """[UCF-1] `local` is fsspec's name for the files of this machine."""
    ek.save({"t": torch.arange(5.0)}, tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    url = f"local://{tmp_path}/c"
    assert ek.open(url).arrays["extra/t"][:].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert ek.open(url).verify().sound
    live = {"t": torch.zeros(5)}
    ek.load(live, url)
    assert live["t"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert main(["verify", url]) == 0
    assert path_in(*locate(url)) == url
    assert path_in(*locate("/c")) == "/c"
