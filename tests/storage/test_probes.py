"""What a folder can do is tried, not believed: without FUSE by refusals of system calls, with it on a mounted file system."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import elastickpt as ek
from elastickpt import errors
from elastickpt.saving.async_save import close_all
from elastickpt.storage import local
from elastickpt.storage.local import LocalStore
from elastickpt.storage.probes import PROBE, Probed, probe

SERVER = Path(__file__).parent.parent / "harness" / "fuse_folder.py"
STATE = {"small": torch.arange(5.0), "large": torch.arange(300_000), "n": 7}


def refusing(code: int) -> Any:
    def refuse(*args: object, **named: object) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


def test_a_folder_of_this_machine_can_do_all(tmp_path: Path) -> None:
    assert probe(str(tmp_path)) == Probed()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "lacks"), [("rename", "no_replace_rename"), ("fsync", "directory_sync"), ("pwrite", "ranged_writes")]
)
def test_what_is_refused_is_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, lacks: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refusing(errno.EINVAL))
        found = probe(str(tmp_path))
    assert not getattr(found, lacks)
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_replaces_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def replacing(source: str, target: str) -> None:
        if os.path.isdir(target):
            for name in os.listdir(target):
                os.unlink(os.path.join(target, name))
        real(source, target)

    monkeypatch.setattr(os, "rename", replacing)
    assert not probe(str(tmp_path)).no_replace_rename


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_where_nothing_can_be_made_what_comes_next_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refusing(code))
        assert probe(str(tmp_path)) == Probed()


def test_reading_tries_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ek.save(STATE, tmp_path / "c")
    monkeypatch.setattr(local, "file_system", lambda path: "0x1badface")
    monkeypatch.setattr(local, "probe", refusing(errno.EROFS))
    ek.load({"small": torch.zeros(5), "large": torch.zeros(300_000, dtype=torch.int64), "n": 0}, tmp_path / "c")
    assert ek.open(tmp_path / "c").verify().problems == ()


@pytest.mark.parametrize("lacks", ["", "directory_sync", "ranged_writes"])
def test_auto_on_a_file_system_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    """Plain where all that is tried works, else packed; and what is not promised is said."""
    monkeypatch.setattr(local, "file_system", lambda path: "0x1badface")
    monkeypatch.setattr(local, "probe", lambda path: Probed(**({lacks: False} if lacks else {})))
    info = ek.save(STATE, tmp_path / "c")
    assert ek.open(info.path).manifest.placement == ("packed" if lacks else "plain")
    assert any("placement 'packed'" in note for note in info.notes) == bool(lacks)
    assert any("directory_sync" in note for note in info.notes) == (lacks == "directory_sync")
    assert ek.open(info.path).verify().problems == ()
    if lacks == "ranged_writes":
        with pytest.raises(errors.PlacementUnsupported, match="packed"):
            ek.save(STATE, tmp_path / "plain", placement="plain")


# -- a file system that refuses ----------------------------------------------------------------------------------------


@contextmanager
def mounted(tmp_path: Path, *refused: str) -> Iterator[Path]:
    """A FUSE file system; skips where there is none."""
    place, folder = tmp_path / "mounted", tmp_path / "behind"
    for made in (place, folder):
        made.mkdir()
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/fuse here that this user may open")
    command = [sys.executable, str(SERVER), str(place), str(folder), *refused]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stderr is not None
    try:
        if server.stdout.readline() != "ready\n":
            pytest.skip(f"nothing may be mounted here: {server.stderr.read()[-200:]}")
        yield place
    finally:
        close_all()
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)
        server.kill()
        server.communicate()


@pytest.mark.parametrize("refused", ["", "sync", "order"])
def test_packs_over_fuse(tmp_path: Path, refused: str) -> None:
    """`auto` makes packs there, blocking and beside training; a pack is written front to back where that is all there is."""
    with mounted(tmp_path, *([refused] if refused else [])) as place:
        store = LocalStore(place)
        assert (store.capabilities.directory_sync, store.capabilities.ranged_writes) == (refused != "sync", refused != "order")
        info = ek.save(STATE, place / "c")
        beside = ek.async_save(STATE, place / "beside").result(60.0)
        for made in (info, beside):
            assert ek.open(made.path).manifest.placement == "packed"
            assert ek.open(made.path).verify().problems == ()
            assert any("directory_sync" in note for note in made.notes) == (refused == "sync")
        live = {"small": torch.zeros(5), "large": torch.zeros(300_000, dtype=torch.int64), "n": 0}
        ek.load(live, place / "beside")
        assert torch.equal(live["large"], STATE["large"])
        if refused == "order":
            small = ek.AsyncOptions(arena_nbytes=2 << 20)
            with pytest.raises(errors.CapabilityMissing, match="order alone"):
                ek.async_save(STATE, place / "portions", options=small).result(60.0)
        assert not [name for name in os.listdir(place) if name.startswith(PROBE)]


@pytest.mark.parametrize("refused", ["rename", "replace"])
def test_without_a_rename_that_replaces_nothing_there_is_no_commit(tmp_path: Path, refused: str) -> None:
    with mounted(tmp_path, refused) as place:
        with pytest.raises(errors.PlacementUnsupported, match="rename that replaces nothing"):
            ek.save(STATE, place / "c")
        assert os.listdir(place) == []
