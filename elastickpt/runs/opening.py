"""`ek.open`: from what people write to one checkpoint. No torch. [RUN-57..59]

runs/llama/step-0000000900.3.1   a folder
runs/llama                       a run: the newest checkpoint of its live branch
runs/llama@latest                the same
runs/llama@900                   step 900 of the live branch
runs/llama@900.3                 step 900 of epoch 3, abandoned or not
runs/llama/latest                the folder that this link names

A path that stands as it is written wins: `@` is a character like others.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

from elastickpt.errors import CheckpointError, Damaged, MissingFile, NotACheckpoint, Refused, Uncommitted
from elastickpt.format.keys import MANIFEST
from elastickpt.ledger.branch import CommitEntry, at_step, entries_of
from elastickpt.ledger.names import LATEST, commits_path, parse_folder
from elastickpt.ledger.objects import complete
from elastickpt.ledger.stored import list_commits, read_view
from elastickpt.ledger.unregistered import lost_text, what_stands
from elastickpt.loading.checkpoint import Checkpoint
from elastickpt.loading.opened import open_in, open_records
from elastickpt.storage.links import link_target
from elastickpt.storage.opening import locate, open_store, path_in
from elastickpt.storage.store import Store

_AT = re.compile(rf"(?P<run>.+)@(?:{LATEST}|(?P<step>[0-9]{{1,18}})(?:\.(?P<epoch>[1-9][0-9]{{0,17}}))?)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint of the run at `run`: of a step, of the live branch or of a named epoch; step None: the newest."""

    run: str
    step: int | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class RunAt:
    """A run and its checkpoints at one moment, as `history` has them."""

    path: str
    store: Store
    entries: tuple[CommitEntry, ...]

    def open(self, entry: CommitEntry) -> Checkpoint:
        """One of the entries. Raises Damaged kinds for a broken one, NotACheckpoint for one that was removed meanwhile."""
        where = path_in(self.store, entry.folder)
        if entry.commit is None:
            raise Damaged(f"{where}: {entry.problem}")
        try:
            return Checkpoint(open_in(self.store, entry.folder, digest=entry.commit.digest))
        except MissingFile:
            if self.stands(entry):
                raise
            raise NotACheckpoint(f"{where}: removed since the run was read") from None

    def stands(self, entry: CommitEntry) -> bool:
        """Whether it is still one of the run: retention may have removed it since. Blocking."""
        return self.store.exists(commits_path(entry.id.register))


def open_checkpoint(
    path: str | os.PathLike[str], *, step: SupportsIndex | None = None, epoch: SupportsIndex | None = None
) -> Checkpoint:
    """Opens a checkpoint for reading; imports no torch, and claims nothing. Only its records are read until something is asked
    for.

    Args:
        path: The folder or URL of a checkpoint, or one of a run: `RUN`, `RUN@latest`, `RUN@900`, `RUN@900.3`. Of a run
            without a step it is the newest one of its live branch.
        step: Instead of a step in `path`; of the live branch unless an epoch is named.
        epoch: Instead of an epoch in `path`.

    Returns:
        The checkpoint, read-only.

    Raises:
        NotACheckpoint: Nothing is there; the nearest steps of a run are named.
        Uncommitted: A draft or an aborted attempt, which never was a checkpoint.
        Unsupported: A later release wrote it.
        Refused: An epoch without a step.
        Damaged: Its manifest, or objects of the run, are not what was written.

    Examples:
        >>> ckpt = ek.open("runs/llama@latest")
        >>> ckpt.step
        900
        >>> ckpt.arrays["params/model/layers.0.weight/value"].shape
        (4, 4)
    """
    found = open_path(path, step=step, epoch=epoch)
    return found.open(_chosen(found, Choice(found.path))) if isinstance(found, RunAt) else found


def open_path(
    path: str | os.PathLike[str], *, step: SupportsIndex | None = None, epoch: SupportsIndex | None = None
) -> Checkpoint | RunAt:
    """What `open_checkpoint` opens, but for a path that is a run's: then the run. Errors as there."""
    text = os.fspath(path)
    choice = choose(text, step=step, epoch=epoch)
    if choice is not None:
        run = _run_of(choice, text)
        return run.open(_chosen(run, choice))
    try:
        return Checkpoint(open_records(_behind_link(text)))
    except Uncommitted:
        raise
    except NotACheckpoint as problem:
        found = run_at(text)
        if found is None:
            raise type(problem)(f"{problem.message}{_lost_hint(text)}") from None
    return found


def folder_of(path: str | os.PathLike[str], *, step: SupportsIndex | None = None, epoch: SupportsIndex | None = None) -> str:
    """The folder, in its run, of the checkpoint that is meant; "" where `path` is not a run's, and is the folder itself.

    Reads no more than it must to know. Raises what `open_checkpoint` raises.
    """
    text = os.fspath(path)
    choice = choose(text, step=step, epoch=epoch)
    if choice is None:
        link = _behind_link(text)
        if link != text:
            return link.rpartition("/")[2]
        store, name = locate(text)
        if store.exists(f"{name}/{MANIFEST}"):
            return ""
        run = open_path(text)
        if not isinstance(run, RunAt):
            return ""
    else:
        run = _run_of(choice, text)
    entry = _chosen(run, choice or Choice(run.path))
    if entry.commit is None:
        raise Damaged(f"{path_in(run.store, entry.folder)}: {entry.problem}")
    return entry.folder


def checkpoint_path(path: str | os.PathLike[str], folder: str, *, step: SupportsIndex | None = None) -> str:
    """Where this process finds the folder that `folder_of` named, perhaps on another host."""
    text = os.fspath(path)
    choice = choose(text, step=step)
    if choice is None and _behind_link(text) != text:
        return _behind_link(text)
    run = text if choice is None else choice.run
    return path_in(open_store(run), folder)


def choose(path: str, *, step: SupportsIndex | None = None, epoch: SupportsIndex | None = None) -> Choice | None:
    """What of which run is meant; None where `path` stands as it is written, or names no step."""
    if step is not None:
        return Choice(path, operator.index(step), None if epoch is None else operator.index(epoch))
    if epoch is not None:
        raise Refused(f"{path}: epoch={epoch} without a step: expected both")
    found = _AT.fullmatch(path)
    if found is None or "/" in path[found.end("run") :] or _stands(path):
        return None
    return Choice(found["run"], *(int(found[name]) if found[name] else None for name in ("step", "epoch")))


def run_at(path: str) -> RunAt | None:
    """The run at `path`, read; None if nobody ever claimed one there.

    Raises StorageFailed kinds, Damaged kinds for an object that says what counts and is not what was written.
    """
    try:
        store = open_store(path)
        if not complete(list_commits(store)).newest:
            return None
    except (MissingFile, NotACheckpoint):
        return None
    return RunAt(path, store, entries_of(complete(read_view(store))))


def newest_of(entries: Sequence[CommitEntry]) -> CommitEntry | None:
    """The newest checkpoint of the live branch, broken or not."""
    return next((one for one in entries if one.state == "live"), None)


def _run_of(choice: Choice, text: str) -> RunAt:
    run = run_at(choice.run)
    if run is None:
        raise NotACheckpoint(f"{text}: {choice.run} is no run (nobody claimed it){_lost_hint(choice.run)}")
    return run


def _chosen(run: RunAt, choice: Choice) -> CommitEntry:
    if choice.step is not None:
        try:
            return at_step(run.entries, step=choice.step, epoch=choice.epoch)
        except NotACheckpoint as problem:
            raise NotACheckpoint(f"{run.path}: {problem.message}") from None
    newest = newest_of(run.entries)
    if newest is None:
        aside = f"; {len(run.entries)} abandoned ones can be named by step and epoch" if run.entries else ""
        raise NotACheckpoint(f"{run.path}: a run without a checkpoint on its live branch{aside}")
    return newest


def _lost_hint(path: str) -> str:
    """What can be done where whole checkpoints of a run stand, and nothing says that it is one; "" elsewhere."""
    try:
        store = open_store(path)
        found = complete(what_stands(store)).unregistered
    except CheckpointError:
        return ""
    return f"; {lost_text(store, found)}" if found else ""


def _stands(path: str) -> bool:
    """Whether there is something of this name, `@` included."""
    try:
        store, name = locate(path)
        return store.exists(name)
    except CheckpointError:
        return False


def _behind_link(path: str) -> str:
    """`RUN/latest` is the checkpoint beside it that this link names; any other path is itself."""
    if os.path.basename(path.rstrip("/")) != LATEST:
        return path
    try:
        store, name = locate(path)
    except NotACheckpoint:
        return path
    target = link_target(store, name)
    found = parse_folder(target) if target is not None else None
    return path if found is None else path_in(store, found[0].folder)
