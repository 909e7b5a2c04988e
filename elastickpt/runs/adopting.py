"""Whole checkpoints of a run that no register names count again, once they have verified. [RUN-105..109]

    look      no trainer holds the run; whose folders are whole, and have no register that counts or was aborted
    verify    every byte of each; what does not verify is left, with the reason, and nothing was changed yet
    claim     epochs of which every object was lost, and the run; its adopted object lists the folders
    register  each says commit, unless somebody said abort
    start     epochs without a start object go on from the newest step below their own; then this one, from the newest epoch's

Stopped anywhere it can be called again: until it is through, what is registered counts or a restore is refused as before.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf

from elastickpt.errors import CheckpointError, Damaged, MissingFile, NotACheckpoint, StorageFailed, Uncommitted
from elastickpt.format.digest import file_digest
from elastickpt.format.keys import MANIFEST
from elastickpt.format.version import MAX_MANIFEST_NBYTES
from elastickpt.ledger.branch import live_branch, point_latest
from elastickpt.ledger.epochs import (
    Holding,
    claim,
    claim_lost,
    counts,
    decide,
    require_newest,
    start,
    start_lost,
)
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import Operations, complete
from elastickpt.ledger.records import AbortRegister, CommitRegister, Found
from elastickpt.ledger.stored import read_register, read_start, read_view
from elastickpt.ledger.unregistered import RunSurvey, folders_text, holds_checkpoint, what_stands
from elastickpt.loading.opened import open_in
from elastickpt.loading.verify import verify
from elastickpt.runs.trainer_address import claimer, require_no_living_trainer
from elastickpt.storage.opening import open_store, path_in
from elastickpt.storage.store import Store

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A folder that was not adopted: kind and message of what is wrong with it."""

    folder: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class AdoptReport:
    """What came of `adopt`.

    Attributes:
        path: The run, as it was given.
        epoch: That of the claim; 0 where there was nothing to do and nothing was changed.
        adopted: The folders that count from now on, newest first.
        live: Those of them that are on the live branch.
        left: The folders that were not adopted, each with the kind and the message of what is wrong with it.

    Examples:
        >>> report = ek.adopt("runs/llama")
        >>> report.epoch, report.adopted
        (0, ())
    """

    path: str
    epoch: int
    adopted: tuple[str, ...]
    live: frozenset[str]
    left: tuple[LeftOut, ...]


def adopt(
    root: str | os.PathLike[str],
    *,
    folders: Collection[str] | None = None,
    progress: Progress = lambda folder, done, total: None,
) -> AdoptReport:
    """Registers whole checkpoints in a run that no register names, once every byte of them has verified. Blocking: it reads
    them.

    For a run whose objects under `commits/` were lost, and for what a crash left.

    Args:
        root: The folder or URL of the run. No job may hold it.
        folders: Which folders are meant; by default all that hold a whole checkpoint.
        progress: Is called with a folder, bytes done and bytes in all, from several threads.

    Returns:
        Which folders count from now on, and which do not, and why.

    Raises:
        RunBusy: A job holds the run.
        NotACheckpoint: A named folder holds none, or is registered already.
        Superseded: A job claimed the run meanwhile.
        StorageFailed: The store does not answer.
        Damaged: Objects of the run are not what was written.

    Examples:
        >>> ek.adopt("runs/llama").adopted
        ()
    """
    try:
        store = open_store(os.fspath(root))
    except MissingFile as error:
        raise NotACheckpoint(f"{os.fspath(root)}: expected the folder of a run, found nothing") from error
    complete(require_no_living_trainer(store))
    standing = complete(what_stands(store))
    counting = complete(_counting(store, standing))
    candidates = _named(complete(_candidates(store, standing)), folders, where=path_in(store, ""))
    good, left = _verified(store, candidates, counting, progress)
    epochs = complete(_epochs_without_start(store, standing, [*counting, *(one.id for one in good)]))
    if not good and not epochs:
        return AdoptReport(os.fspath(root), 0, (), frozenset(), tuple(left))
    if store.capabilities.tree_sync:
        store.sync_tree()  # they may have been copied here a moment ago [RUN-41]
    complete(require_no_living_trainer(store))
    epoch, refused = complete(_register(store, standing, good, epochs))
    complete(point_latest(store))
    live = live_branch(complete(read_view(store)))
    adopted = sorted({one.id for one in good} - {one for one, _ in refused}, key=_age, reverse=True)
    left += [LeftOut(one.folder, Uncommitted.kind, why) for one, why in refused]
    shown = frozenset(one.folder for one in adopted if one in live)
    return AdoptReport(os.fspath(root), epoch, tuple(one.folder for one in adopted), shown, tuple(left))


# -- what there is ---------------------------------------------------------------------------------------------------------


def _counting(store: Store, standing: RunSurvey) -> Operations[list[AttemptId]]:
    """The attempts with a folder and a register that says commit and counts."""
    found: list[AttemptId] = []
    for one in standing.registered:
        if counts(one, standing.newest):
            found += [one] if isinstance((yield from read_register(store, one)), CommitRegister) else []
    return found


def _candidates(store: Store, standing: RunSurvey) -> Operations[list[AttemptId]]:
    """Whole, and without a register; or with one that says commit, of an epoch whose adopted object was lost."""
    found = list(standing.unregistered)
    newest = 0 if standing.newest is None else standing.newest.epoch
    for one in standing.registered:
        if one.epoch > newest and isinstance((yield from read_register(store, one)), CommitRegister):
            found += [one] if (yield from holds_checkpoint(store, one)) else []
    return sorted(found, key=_age, reverse=True)


def _named(candidates: Sequence[AttemptId], folders: Collection[str] | None, *, where: str) -> list[AttemptId]:
    if folders is None:
        return list(candidates)
    names = {os.path.basename(name.rstrip("/")) for name in folders}
    found = [one for one in candidates if one.folder in names]
    unknown = sorted(names - {one.folder for one in found})
    if unknown:
        there = folders_text(candidates) or "none"
        raise NotACheckpoint(
            f"{where}: {', '.join(unknown)}: expected whole checkpoints without a register, of which it has {there}"
        )
    return found


def _verified(
    store: Store, candidates: Iterable[AttemptId], counting: Collection[AttemptId], progress: Progress
) -> tuple[list[CommitRegister], list[LeftOut]]:
    """Registers for those that are whole, of one step and epoch the last attempt; the others, and why."""
    taken = {(one.step, one.epoch) for one in counting}
    good: list[CommitRegister] = []
    left: list[LeftOut] = []
    for one in candidates:
        try:
            if (one.step, one.epoch) in taken:
                raise NotACheckpoint(f"step {one.step} of epoch {one.epoch} has another commit")
            good.append(_register_of(store, one, progress))
            taken.add((one.step, one.epoch))
        except StorageFailed:
            raise
        except CheckpointError as problem:
            left.append(LeftOut(one.folder, problem.kind, problem.message))
    return good, left


def _register_of(store: Store, attempt: AttemptId, progress: Progress) -> CommitRegister:
    """What its register is to say, or says. Raises the kind of error of the first thing that is wrong with it."""
    folder = attempt.folder
    try:
        said = complete(read_register(store, attempt))
    except MissingFile:
        said = None
    if isinstance(said, AbortRegister):
        raise Uncommitted(f"its register says abort: {said.reason}")
    digest = said.digest if said else file_digest(store.read(f"{folder}/{MANIFEST}", MAX_MANIFEST_NBYTES))
    opened = open_in(store, folder, digest=digest)
    if opened.manifest.step != attempt.step:
        raise Damaged(f"{MANIFEST}: expected step {attempt.step} (in the folder's name), found {opened.manifest.step}")
    report = verify(opened, progress=lambda done, total: progress(folder, done, total))
    if report.problems:
        first, more = report.problems[0], len(report.problems) - 1
        raise Damaged(f"{first.message} [{first.kind}]" + (f", and {more} problems more" if more else ""))
    nbytes = sum(record.spec.nbytes for record in opened.records.values())
    return said or CommitRegister(attempt, digest, nbytes, opened.manifest.time)


def _epochs_without_start(store: Store, standing: RunSurvey, ids: Collection[AttemptId]) -> Operations[list[int]]:
    """Epochs that the live branch may pass through, and whose start objects are not there."""
    needed = {one.epoch for one in ids}
    oldest = min(needed, default=0)
    for epoch in standing.epochs.starts:
        if epoch > oldest > 0:
            continued = (yield from read_start(store, epoch)).continued
            needed |= {continued.epoch} if continued is not None and continued.epoch >= oldest else set()
    return sorted(needed - standing.epochs.starts)


# -- what is done ----------------------------------------------------------------------------------------------------------


def _register(
    store: Store, standing: RunSurvey, good: Sequence[CommitRegister], epochs: Collection[int]
) -> Operations[tuple[int, list[tuple[AttemptId, str]]]]:
    """The epoch that adopted, and what somebody else had aborted meanwhile."""
    by = claimer("", secrets.token_hex(16))
    ids = {one.id for one in good}
    lost = {*epochs, *(one.epoch for one in ids)} - standing.epochs.claims - standing.epochs.adopted
    yield from claim_lost(store, by, epochs=lost)  # so that the claim is above them, and closes them
    holding = yield from claim(store, by, adopting=ids)
    refused = []
    for register in sorted(good, key=lambda one: one.id):
        yield from require_newest(store, holding.epoch)
        said = yield from decide(store, register)
        if not isinstance(said, CommitRegister):
            refused.append((said.id, f"its register says abort: {said.reason}"))
    aborted = {one for one, _ in refused}
    counting = {one for one in holding.adopted.commits if one not in aborted}
    yield from start_lost(store, continued={epoch: _continued(epoch, counting) for epoch in epochs})
    yield from _start(store, holding, ids - aborted)
    return holding.epoch, refused


def _start(store: Store, holding: Holding, adopted: Collection[AttemptId]) -> Operations[None]:
    """The live branch goes on from its newest commit, or from what was adopted of a newer epoch, or of that one later."""
    branch = live_branch((yield from read_view(store)))
    newest = max([*branch[:1], *adopted], key=_age, default=None)
    found = Found(time.time(), True) if newest in adopted else None
    yield from start(store, holding, continued=newest, found=found)


def _continued(epoch: int, ids: Collection[AttemptId]) -> AttemptId | None:
    """Where an epoch most likely went on from: the newest step below its own first one, in an epoch before it."""
    first = min((one.step for one in ids if one.epoch == epoch), default=inf)
    before = [one for one in ids if one.epoch < epoch and one.step < first]
    if first == inf:
        return max(before, key=_age, default=None)
    return max(before, default=None)


def _age(attempt: AttemptId) -> tuple[int, int, int]:
    """Rises with the history of a run."""
    return attempt.epoch, attempt.step, attempt.attempt
