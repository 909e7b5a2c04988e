"""The draft of a checkpoint: a hidden folder beside the path, whose rename to the path is the commit. [SAVE-20..24]

    .NAME.draft-HOST-PID-START-ATTEMPT            being written; not a checkpoint for any reader
    .NAME.draft-HOST-PID-START-ATTEMPT.aborted    given up; a committer that comes late finds nothing to rename
    NAME                                          the checkpoint

HOST, PID and START (of the process, in units of 10 ms since boot of its host) say whose it is, so that the next save beside it
can sweep those whose process is provably gone, and name the others. HOST includes the boot and the process-id namespace: hosts
with one name are not rare, and what ran before a restart, or in a container that is gone, cannot be told from another host's.

Marks say which attempts are worked on: names that all processes of a host can list. [SAVE-86] A trainer makes the mark when it
hands an attempt to its writer, and the writer gets it too, by descriptor. A name in the abstract socket namespace is there as
long as anybody has it, or has been sent it, and goes with the last process, however that ends: no file is left behind, no lock
to break.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from elastickpt.errors import (
    CheckpointError,
    Malformed,
    MissingFile,
    PathOccupied,
    PlacementUnsupported,
    Refused,
    StorageFailed,
)
from elastickpt.format.arrays import Section
from elastickpt.format.canonical_json import dump
from elastickpt.format.digest import block_checksum
from elastickpt.format.encode_manifest import decode_manifest
from elastickpt.format.keys import DRAFT_TOKEN, MANIFEST
from elastickpt.format.version import MAX_MANIFEST_NBYTES
from elastickpt.ranks.addresses import not_in_forks
from elastickpt.ranks.processes import process_fields, process_is_there, process_start
from elastickpt.storage.store import Store

_PREFIX = "@elastickpt-work-"  # as /proc/net/unix shows it; the first byte of the name is zero


def mark(store: str, attempt: str) -> socket.socket:
    """The mark of a new attempt of this process, below that store's root; there until it is closed everywhere."""
    held = not_in_forks(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    held.bind(f"\0{_PREFIX[1:]}{_place(store)}-{attempt}-{secrets.token_hex(4)}")
    return held


def marked(store: str) -> Collection[str]:
    """The attempts below that store's root that writers of this host are working on now."""
    prefix = f"{_PREFIX}{_place(store)}-"
    names = (line.rpartition(" ")[2] for line in Path("/proc/net/unix").read_text(errors="replace").splitlines())
    return frozenset(name.removeprefix(prefix).rpartition("-")[0] for name in names if name.startswith(prefix))


def _place(store: str) -> str:
    return block_checksum(store.encode()).to_bytes(8, "big").hex()


CONTENTS = "draft.contents"  # what another committer needs, while the draft is one [SAVE-85]
CONVERSION = "draft.conversion"  # what a conversion is, which goes on from the draft if it is interrupted [CLI-67]
JOURNAL = "draft.journal"  # and what is done of it
LEFTOVERS = (DRAFT_TOKEN, CONTENTS, CONVERSION, JOURNAL)  # what is only in a draft [SAVE-22, SAVE-85]
ABORTED = ".aborted"
MAX_TOKEN_NBYTES = 4096
_NAME = re.compile(
    r"\.(?P<name>.+)\.draft-(?P<host>[A-Za-z0-9.]*)-(?P<pid>[1-9][0-9]*)-(?P<start>[0-9]+)-(?P<attempt>[0-9a-f]{16})"
    rf"(?:{re.escape(ABORTED)})?"
)

# Attempts that this process is writing now: its other drafts are leftovers, though their process lives.
_UNDER_WAY: set[str] = set()


def _host_word() -> str:
    """Host name, boot and process-id namespace: process ids mean something only to those who share all three."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    namespace = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    return f"{re.sub(r'[^A-Za-z0-9.]', '', socket.gethostname())[:48]}.{boot}.{namespace}"


def _short(name: str) -> str:
    """The checkpoint's name as part of a draft's, which may have 255 bytes in all."""
    raw = name.encode()
    return name if len(raw) <= 100 else raw[:60].decode(errors="ignore") + "~" + block_checksum(raw).to_bytes(8, "big").hex()


@dataclass(frozen=True, slots=True)
class Draft:
    """One attempt to write one checkpoint. `folder` and `name` are siblings in the store's root, or the same: then a register
    of the run decides whether it is a checkpoint."""

    name: str
    folder: str
    attempt: str

    def path(self, relative: str) -> str:
        """Where a file of the checkpoint stands while it is a draft, relative to the store's root."""
        return f"{self.folder}/{relative}"


@dataclass(frozen=True, slots=True)
class DraftFound:
    """A draft beside a path. `why`: why it may still be in use, None when nobody can write it, for certain. `resumable`: a
    conversion was interrupted, which the same command takes up. [CLI-67]"""

    folder: str
    attempt: str
    why: str | None
    lives: bool
    resumable: bool


@dataclass(frozen=True, slots=True)
class SweptDrafts:
    """Drafts found beside the path: removed ones, and those whose owner may live (folder → why it was left)."""

    removed: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def new_draft(name: str, *, pid: int, attempt: str | None = None) -> Draft:
    """A draft of `name` owned by process `pid` of this host, of a new attempt unless one is given; nothing is created yet."""
    attempt = attempt or secrets.token_hex(8)
    return Draft(name, f".{_short(name)}.draft-{_host_word()}-{pid}-{process_start(pid) or 0}-{attempt}", attempt)


def is_draft(name: str) -> bool:
    """Whether a folder of this name is a draft, aborted or not, whatever it holds. [SAVE-23]"""
    return _NAME.fullmatch(name) is not None


def require_free(store: Store, name: str) -> None:
    """Raises PathOccupied unless nothing, or an empty folder, stands at the path. [SAVE-31]

    Refused for the name of a draft, which a later save would sweep. [SAVE-23]
    """
    if is_draft(name):
        raise Refused(f"{store.url}/{name}: expected the name of a checkpoint, found one that drafts have; choose another")
    if not store.exists(name):
        return
    try:
        held = store.entries(name)
    except MissingFile:
        raise PathOccupied(f"{store.url}/{name}: expected nothing or an empty folder, found a file") from None
    if held:
        what = "a checkpoint" if any(entry.name == MANIFEST for entry in held) else f"{len(held)} entries"
        raise PathOccupied(
            f"{store.url}/{name}: expected nothing or an empty folder, found {what}; "
            "a save never overwrites: choose another path, or remove that one first"
        )


def _token(draft: Draft) -> bytes:
    found = _NAME.fullmatch(draft.folder)
    if found is None and draft.folder != draft.name:
        raise Malformed(f"{draft.folder}: expected the name of a draft")
    # an attempt of a run has its folder's name from the beginning, and its owner in the run's claim
    owner = {"host": found["host"], "pid": int(found["pid"]), "start": int(found["start"])} if found else {}
    return dump({"format": "elastickpt-draft", "version": 1, "attempt": draft.attempt, **owner}).encode()


def begin(store: Store, draft: Draft, *, sections: Iterable[Section] = ()) -> None:
    """Creates the draft folder with its token file, by which other writers see that they share the file system.

    `sections`: some that will hold arrays. Whoever makes the draft makes their folders best, as nobody else knows of them yet
    (`storage.kernel.make_spread`).

    After an error nothing of it is left, as far as the store can remove it. Raises StorageFailed kinds.
    """
    _UNDER_WAY.add(draft.attempt)
    try:
        store.make_directories(draft.folder)
        store.create(draft.path(DRAFT_TOKEN), _token(draft))
        for folder in ("fragments", *sorted(sections)):
            store.make_directories(draft.path(folder))
    except BaseException as error:  # an interrupt, too: nobody else has the draft yet
        _UNDER_WAY.discard(draft.attempt)
        if not isinstance(error, PathOccupied):  # else it is not ours
            with suppress(CheckpointError):
                store.remove_tree(draft.folder)
        raise


def require_token(store: Store, draft: Draft) -> None:
    """Raises PlacementUnsupported if this writer does not see the committer's draft. [SAVE-21]"""
    try:
        found = store.read(draft.path(DRAFT_TOKEN), MAX_TOKEN_NBYTES)
    except MissingFile:
        found = b""
    if found != _token(draft):
        raise PlacementUnsupported(
            f"{store.url}: this rank does not see the draft {draft.folder} that rank 0 made; "
            "all ranks must write to one file system"
        )


def commit(store: Store, draft: Draft) -> None:
    """The commit point: afterwards the checkpoint exists. Raises PathOccupied if something took the path. [SAVE-52]

    A rename can succeed and its answer be lost, as over a network; so after an error it looks, and obeys what it finds.
    StorageFailed that says "not known" where it cannot look either. [SAVE-56]
    """
    try:
        store.rename(draft.folder, draft.name)
    except CheckpointError as error:
        if not _committed(store, draft, error):
            raise
    _UNDER_WAY.discard(draft.attempt)


def _committed(store: Store, draft: Draft, failure: CheckpointError) -> bool:
    """Whether this attempt stands at the path although its rename failed."""
    try:
        data = store.read(f"{draft.name}/{MANIFEST}", MAX_MANIFEST_NBYTES)
        return decode_manifest(data, path=MANIFEST).attempt == draft.attempt
    except StorageFailed as unseen:
        cls = type(failure) if isinstance(failure, StorageFailed) else StorageFailed
        raise cls(
            f"{store.url}/{draft.name}: whether it was committed is not known: {failure}; looking for it: {unseen}"
        ) from failure
    except CheckpointError:
        return False  # nothing there, or something of others


def abort(store: Store, draft: Draft) -> None:
    """Makes the draft unusable for any late committer, then removes it; what cannot be removed is swept later. [SAVE-55]

    Raises nothing: it runs while another error is on its way.
    """
    _UNDER_WAY.discard(draft.attempt)
    remove_draft(store, draft.folder)


def remove_draft(store: Store, folder: str) -> CheckpointError | None:
    """A draft is no more, under its own name first: a writer that still runs then finds no folder to write into, and cannot
    bring it back. What prevented that, if anything did: a draft is no checkpoint in any case."""
    aborted = folder.removesuffix(ABORTED) + ABORTED
    try:
        if folder != aborted:
            store.rename(folder, aborted)
        store.remove_tree(aborted)
    except CheckpointError as error:
        return error
    return None


def ended(draft: Draft) -> None:
    """This process has heard how the attempt ended, whoever ended it: what is left of the draft may be swept."""
    _UNDER_WAY.discard(draft.attempt)


def drafts_of(store: Store, name: str) -> tuple[DraftFound, ...]:
    """The drafts of `name` beside it, aborted ones too."""
    working = marked(store.url)
    found = []
    for entry in store.entries(""):
        match = _NAME.fullmatch(entry.name)
        if match is None or match["name"] != _short(name) or entry.kind != "directory":
            continue
        why = "a writer of this host still works on it" if match["attempt"] in working else _why_left(match)
        lives = why is not None and match["host"] == _host_word()
        resumable = not entry.name.endswith(ABORTED) and store.exists(f"{entry.name}/{CONVERSION}")
        found.append(DraftFound(entry.name, match["attempt"], why, lives, resumable))
    return tuple(found)


def sweep(store: Store, name: str) -> SweptDrafts:
    """Removes drafts of `name` that nobody writes any more, as far as this host can prove it, and names the others. [SAVE-24]

    Those are drafts of processes that are gone, and of this process but of attempts that it has ended; not those that a writer
    finishes for a process that is gone, nor those of a conversion, which goes on from there.
    """
    removed: list[str] = []
    left: list[tuple[str, str]] = []
    for found in drafts_of(store, name):
        why = found.why
        if why is None and found.resumable:
            why = "a conversion was interrupted there, and the same command goes on from it"
        failed = None if why else remove_draft(store, found.folder)
        if why or failed:
            left.append((found.folder, why or f"nobody writes it any more, but it cannot be removed: {failed}"))
        else:
            removed.append(found.folder)
    return SweptDrafts(tuple(removed), tuple(left))


def take_up(store: Store, found: DraftFound, name: str, *, pid: int) -> Draft:
    """The draft of a process that is gone is this one's from now on, with all that it holds; the attempt stays the same.

    Of several that try only one succeeds: MissingFile for the others. Raises StorageFailed kinds.
    """
    draft = new_draft(name, pid=pid, attempt=found.attempt)
    store.rename(found.folder, draft.folder)
    _UNDER_WAY.add(draft.attempt)
    store.remove(draft.path(DRAFT_TOKEN))
    store.create(draft.path(DRAFT_TOKEN), _token(draft))
    return draft


def _why_left(draft: re.Match[str]) -> str | None:
    """Why a draft may still be in use; None when nobody can write it, for certain."""
    host, pid, start = draft["host"], int(draft["pid"]), int(draft["start"])
    if host != _host_word():
        return f"made on host {host!r}, or before it was last started, which cannot be asked from here"
    if pid == os.getpid() and start == process_start(pid):
        return "this process is writing it" if draft["attempt"] in _UNDER_WAY else None
    fields = process_fields(pid)
    if fields is None:
        return f"process {pid} of this host runs, and does not show since when" if process_is_there(pid) else None
    state, threads, began = fields[0], int(fields[17]), int(fields[19])
    if began != start or (state in "ZX" and threads <= 1):
        return None
    return f"process {pid} of this host still runs"
