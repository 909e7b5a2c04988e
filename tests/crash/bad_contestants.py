"""Contestants that do on purpose what `tools.chaos` must find: in place, without syncs, without a limit, unverified."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from tools.chaos.contents import State, held
from tools.chaos.entrants import Contestant, Entrant, Finish
from tools.chaos.step_folders import Overwriting, StepFolders, nothing_left_to_wait_for


def _files(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """A file for each rank and tensor; a tensor's files, one after the other, are its rows."""
    for item, tensors in state.items():
        for name, tensor in tensors.items():
            assert isinstance(tensor, DTensor)
            yield f"{item}.{name}.{distributed.get_rank()}", tensor.to_local()


def _write(path: Path, tensor: torch.Tensor, *, synced: bool) -> None:
    """In place, so that a file keeps its length."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(descriptor, tensor.numpy().tobytes(), 0)
        if synced:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load(state: State, path: Path) -> None:
    """By one rank."""
    for item, tensors in state.items():
        for name, tensor in tensors.items():
            assert isinstance(tensor, DTensor)
            data = b"".join(file.read_bytes() for file in sorted(path.glob(f"{item}.{name}.*")))
            tensor.to_local().copy_(torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(tensor.shape))


def _in_place(state: State, path: Path) -> Finish:
    path.mkdir(exist_ok=True)
    for name, tensor in _files(state):
        _write(path / name, tensor, synced=True)
        time.sleep(0.005)
    return nothing_left_to_wait_for


def _unsynced(state: State, path: Path) -> Finish:
    draft = path.with_suffix(".draft")
    draft.mkdir()
    for name, tensor in _files(state):
        _write(draft / name, tensor, synced=False)
    draft.rename(path)
    return nothing_left_to_wait_for


def _without_limit(state: State, path: Path) -> Finish:
    path.mkdir(exist_ok=True)
    for name, tensor in _files(state):
        _write(path / name, tensor, synced=False)
    marks = path.with_suffix(".marks")
    marks.mkdir(exist_ok=True)
    time.sleep(0.3 * distributed.get_rank())
    (marks / str(distributed.get_rank())).touch()
    while len(list(marks.iterdir())) < distributed.get_world_size():
        time.sleep(0.01)
    return nothing_left_to_wait_for


def _load_or_wait(state: State, path: Path) -> None:
    _load(state, path)
    while held(state) is None:
        time.sleep(1)


def _load_or_die(state: State, path: Path) -> None:
    _load(state, path)
    if held(state) is None:
        os.abort()


def _tearing(folder: Path) -> Contestant:
    return Overwriting(folder, _in_place, _load)


def _losing(folder: Path) -> Contestant:
    return StepFolders(folder, _unsynced, _load)


def _hanging(folder: Path) -> Contestant:
    return StepFolders(folder, _without_limit, _load)


def _waiting(folder: Path) -> Contestant:
    return StepFolders(folder, _unsynced, _load_or_wait)


def _dying(folder: Path) -> Contestant:
    return StepFolders(folder, _unsynced, _load_or_die)


def _through_a_helper(state: State, path: Path) -> Finish:
    """Which is started at the first save only."""
    if not _helpers:
        _helpers.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
    time.sleep(0.1)
    if _helpers[0].poll() is not None:
        raise BrokenPipeError("the helper is dead")
    return _unsynced_by_each(state, path)


def _unsynced_by_each(state: State, path: Path) -> Finish:
    path.mkdir(exist_ok=True)
    for name, tensor in _files(state):
        _write(path / name, tensor, synced=False)
    return nothing_left_to_wait_for


def _with_a_helper(folder: Path) -> Contestant:
    return StepFolders(folder, _through_a_helper, _load)


_helpers: list[subprocess.Popen[bytes]] = []

TEARING = Entrant("bad_contestants:TEARING", "", "one path written in place", _tearing, keeps=0)
LOSING = Entrant("bad_contestants:LOSING", "", "nothing is synced", _losing)
HANGING = Entrant("bad_contestants:HANGING", "", "waits for its peers without a limit", _hanging)
UNVERIFIED = Entrant("bad_contestants:UNVERIFIED", "", "no checksums", _losing)
WAITING = Entrant("bad_contestants:WAITING", "", "loads what is damaged over and over", _waiting)
DYING = Entrant("bad_contestants:DYING", "", "dies of what is damaged", _dying)
HELPLESS = Entrant(
    "bad_contestants:HELPLESS",
    "",
    "starts its helper once and for all",
    _with_a_helper,
    roles=("committer", "trainer", "helper"),
)
