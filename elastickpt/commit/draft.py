"""The draft of a checkpoint: a hidden folder beside the path, whose rename to the path is the commit. [SAVE-20..24]

    .NAME.draft-HOST-PID-START-ATTEMPT            being written; not a checkpoint for any reader
    .NAME.draft-HOST-PID-START-ATTEMPT.aborted    given up; a committer that comes late finds nothing to rename
    NAME                                          the checkpoint

HOST, PID and START (of the process, in units of 10 ms since boot of its host) say whose it is, so that the next save beside it
can sweep those whose process is provably gone, and name the others.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from elastickpt.errors import CheckpointError, MissingFile, PathOccupied, PlacementUnsupported, StorageFailed
from elastickpt.format.digest import block_checksum
from elastickpt.storage.store import Store

TOKEN = "draft.json"
ABORTED = ".aborted"
_NAME = re.compile(r"\.(?P<name>.+)\.draft-(?P<host>[A-Za-z0-9.]*)-(?P<pid>\d+)-(?P<start>\d+)-(?P<attempt>[0-9a-f]{16})")


def _host_word() -> str:
    """Host name and process-id namespace: process ids mean something only to those who share both."""
    namespace = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    return f"{re.sub(r'[^A-Za-z0-9.]', '', socket.gethostname())[:48]}.{namespace}"


def _short(name: str) -> str:
    """The checkpoint's name as part of a draft's, which may have 255 bytes in all."""
    raw = name.encode()
    return name if len(raw) <= 100 else raw[:60].decode(errors="ignore") + "~" + block_checksum(raw).to_bytes(8, "big").hex()


def process_start(pid: int) -> int | None:
    """When a process of this host began, in clock ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the command before it may hold spaces and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True, slots=True)
class Draft:
    """One attempt to write one checkpoint. `folder` and `name` are siblings in the store's root."""

    name: str
    folder: str
    attempt: str

    def path(self, relative: str) -> str:
        """Where a file of the checkpoint stands while it is a draft, relative to the store's root."""
        return f"{self.folder}/{relative}"


@dataclass(frozen=True, slots=True)
class SweepReport:
    """Drafts found beside the path: removed ones, and those whose owner may live (folder → why it was left)."""

    removed: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def new_draft(name: str, *, pid: int) -> Draft:
    """A draft of `name` owned by process `pid` of this host; nothing is created yet."""
    attempt = secrets.token_hex(8)
    return Draft(name, f".{_short(name)}.draft-{_host_word()}-{pid}-{process_start(pid) or 0}-{attempt}", attempt)


def require_free(store: Store, name: str) -> None:
    """Raises PathOccupied unless nothing, or an empty folder, stands at the path. [SAVE-31]"""
    if not store.exists(name):
        return
    try:
        held = store.entries(name)
    except (StorageFailed, MissingFile):
        raise PathOccupied(f"{store.url}/{name}: expected nothing or an empty folder, found a file") from None
    if held:
        what = "a checkpoint" if any(entry.name == "checkpoint.json" for entry in held) else f"{len(held)} entries"
        raise PathOccupied(
            f"{store.url}/{name}: expected nothing or an empty folder, found {what}; "
            "a save never overwrites: choose another path, or remove that one first"
        )


def begin(store: Store, draft: Draft) -> None:
    """Creates the draft folder with its token file, by which other writers see that they share the file system."""
    store.make_directories(draft.folder)
    store.create(draft.path(TOKEN), draft.attempt.encode())
    store.make_directories(draft.path("fragments"))


def require_token(store: Store, draft: Draft) -> None:
    """Raises PlacementUnsupported if this writer does not see the committer's draft. [SAVE-21]"""
    try:
        found = store.read(draft.path(TOKEN), 64)
    except MissingFile:
        found = b""
    if found != draft.attempt.encode():
        raise PlacementUnsupported(
            f"{store.url}: this rank does not see the draft {draft.folder} that rank 0 made; "
            "all ranks must write to one file system (placement 'packed' is not built yet)"
        )


def commit(store: Store, draft: Draft) -> None:
    """The commit point: afterwards the checkpoint exists. Raises PathOccupied if something took the path. [SAVE-52]"""
    store.rename(draft.folder, draft.name)


def abort(store: Store, draft: Draft) -> None:
    """Makes the draft unusable for any late committer, then removes it; what cannot be removed is swept later. [SAVE-55]"""
    aborted = draft.folder + ABORTED
    try:
        store.rename(draft.folder, aborted)
    except CheckpointError:
        return  # never begun, or gone, or the store fails: a draft is no checkpoint in any case
    try:
        store.remove_tree(aborted)
    except StorageFailed:
        return  # a reader never takes it for a checkpoint; the next save beside it sweeps it


def sweep(store: Store, name: str) -> SweepReport:
    """Removes drafts of `name` whose process is provably gone on this host, and names the others. [SAVE-24]"""
    removed: list[str] = []
    left: list[tuple[str, str]] = []
    for entry in store.entries(""):
        folder = entry.name
        found = _NAME.fullmatch(folder.removesuffix(ABORTED))
        if found is None or found["name"] != _short(name):
            continue
        why = _why_left(found["host"], int(found["pid"]), int(found["start"]))
        if why is None:
            store.remove_tree(folder)
            removed.append(folder)
        else:
            left.append((folder, why))
    return SweepReport(tuple(removed), tuple(left))


def _why_left(host: str, pid: int, start: int) -> str | None:
    """Why a draft may still be in use; None when its process is gone for certain."""
    if host != _host_word():
        return f"made on host {host!r}, which cannot be asked from here"
    running = process_start(pid)
    if running is not None and running == start:
        return f"process {pid} of this host still runs"
    return None
