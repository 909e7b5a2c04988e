"""Whole checkpoints of a run that no register names: what a crash left, or what is left where registers were lost.

A crash between the last file of a checkpoint and its register leaves one such folder: the next job goes on without it, and
says so. What no crash can leave means that objects under `commits/` are gone; a job that claimed the run all the same would
begin anew beside its own checkpoints, and sweep them. [RUN-100..104]

    nothing under `commits/` names an epoch, and whole folders stand                 lost
    a folder, or a register with one, is of an epoch without a start object          lost: attempts begin after it [RUN-37]
    ... or of one above the newest that adopted                                      lost: that one adopted, too
    the newest epoch adopted one of them, and has not started                        lost, or adopted in part: to be ended
    no commit is live, and the newest epoch had adopted one of them                  lost: the last one is never removed
    no commit is live, and `latest` names one of them, or there are several          lost
    else                                                                             a crash; it is kept, and named
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastickpt.errors import CheckpointError, MissingFile, Refused, StorageFailed, Unsupported
from elastickpt.format.encode_manifest import decode_manifest
from elastickpt.format.keys import DRAFT_TOKEN, MANIFEST
from elastickpt.format.version import MAX_MANIFEST_NBYTES
from elastickpt.ledger.branch import live_branch
from elastickpt.ledger.names import LATEST, AttemptId, RunObjects, adopted_name, parse_folder, start_name
from elastickpt.ledger.objects import NOW, Operations
from elastickpt.ledger.records import Adopted, CommitRegister
from elastickpt.ledger.stored import attempt_folders, list_commits, newest_adopted, read_view
from elastickpt.storage.links import link_target
from elastickpt.storage.opening import path_in
from elastickpt.storage.store import Store

SHOWN_FOLDERS = 6  # in a message


@dataclass(frozen=True, slots=True)
class RunSurvey:
    """What stands in a run at one moment, before it is known what that means; attempts rise.

    `unregistered` have a whole manifest and no register, `registered` a folder and a register. `live` is the newest step of the
    live branch that can be opened, -1 for none; `latest` what the link for people names.
    """

    epochs: RunObjects
    newest: Adopted | None
    unregistered: tuple[AttemptId, ...]
    registered: tuple[AttemptId, ...]
    live: int
    latest: AttemptId | None

    @property
    def beyond(self) -> tuple[AttemptId, ...]:
        """The unregistered ones that the live branch has not come to."""
        return tuple(one for one in self.unregistered if one.step > self.live)


def require_registers(store: Store) -> Operations[RunSurvey]:
    """What stands in the run, of which nothing is lost that a crash cannot explain. Before a claim; reads only.

    Raises Refused, naming the folders and what can be done, StorageFailed kinds, Damaged kinds for objects of the run that are
    not what was written. [RUN-100..102]
    """
    standing = yield from what_stands(store)
    why = what_is_lost(standing)
    if why:
        raise Refused(_advice(store, standing, why))
    return standing


def what_is_lost(standing: RunSurvey) -> str:
    """Why objects of the run must be gone; "" where a crash explains what stands."""
    epochs, newest = standing.epochs, standing.newest
    if not epochs.newest:
        return "nothing under commits/ says what counts" if standing.unregistered else ""
    named = sorted({one.epoch for one in (*standing.unregistered, *standing.registered)})
    for epoch in named:
        if epoch not in epochs.starts:
            return f"commits/{start_name(epoch)} is not there, though the epoch has checkpoints"
    if named and (newest is None or named[-1] > newest.epoch):
        return f"commits/{adopted_name(named[-1])} is not there or closes the epoch, which has checkpoints"
    adopted = set(newest.commits if newest is not None else ()) & set(standing.unregistered)
    if adopted and newest is not None and newest.epoch not in epochs.starts:
        return f"epoch {newest.epoch} adopted checkpoints whose registers are not there: adopting them was interrupted"
    if standing.live >= 0 or not standing.unregistered:
        return ""
    if adopted or standing.latest in standing.unregistered or len(standing.unregistered) > 1:
        return "no register under commits/ is left for any checkpoint of the live branch"
    return ""


def what_stands(store: Store) -> Operations[RunSurvey]:
    """Reads manifests of folders without a register only, and what counts only if there are such. Errors as reading a run."""
    try:
        folders = frozenset((yield from attempt_folders(store)).attempts)
    except MissingFile:
        folders = frozenset()
    listing = yield from list_commits(store)
    alone = folders if not listing.newest else folders - listing.registers  # without epochs no register says anything
    unregistered: list[AttemptId] = []
    for attempt in sorted(alone):
        unregistered += [attempt] if (yield from holds_checkpoint(store, attempt)) else []
    epochs = yield from list_commits(store)  # not before what is asked about: its epoch had started when it was made
    newest = yield from newest_adopted(store, epochs, before=epochs.newest + 1)
    live, latest = -1, None
    if unregistered and epochs.newest and epochs.starts >= {one.epoch for one in unregistered}:
        live = yield from live_step(store)
        latest = yield from _latest(store)
    return RunSurvey(epochs, newest, tuple(unregistered), tuple(sorted(folders - alone)), live, latest)


def live_step(store: Store) -> Operations[int]:
    """The newest step of the live branch whose commit can be opened; -1 for none. Errors as reading a run."""
    view = yield from read_view(store)
    good = {one.id for one in view.commits if isinstance(one, CommitRegister)}
    return max((one.step for one in live_branch(view) if one in good), default=-1)


def holds_checkpoint(store: Store, attempt: AttemptId) -> Operations[bool]:
    """Whether its folder holds a whole manifest, and is no draft any more. Raises StorageFailed kinds."""
    yield NOW
    try:
        decode_manifest(store.read(f"{attempt.folder}/{MANIFEST}", MAX_MANIFEST_NBYTES), path=MANIFEST)
    except StorageFailed:
        raise
    except Unsupported:
        pass  # of a later release: not ours to judge
    except CheckpointError:
        return False
    yield NOW
    return not store.exists(f"{attempt.folder}/{DRAFT_TOKEN}")


def folders_text(attempts: Sequence[AttemptId]) -> str:
    """Their folders, newest first; of many the newest, and how many more."""
    shown = ", ".join(one.folder for one in sorted(attempts, reverse=True)[:SHOWN_FOLDERS])
    more = len(attempts) - SHOWN_FOLDERS
    return f"{shown} and {more:,} more" if more > 0 else shown


def kept_note(store: Store, attempt: AttemptId) -> str:
    """What is said of a folder that a job goes on without. [RUN-103]"""
    run = path_in(store, "").rstrip("/")
    return (
        f"{run}/{attempt.folder} holds a whole checkpoint that no register names, as a crash in its last moment leaves it: it "
        f"was not restored, and stays until the live branch has a commit at step {attempt.step} or a later one; to have it "
        f"count, end this job and {_adopting(run)}"
    )


def lost_text(store: Store, attempts: Sequence[AttemptId]) -> str:
    """What is said of a folder that would be a run if its registers were there."""
    run = path_in(store, "").rstrip("/")
    return f"it has whole checkpoints of a run, without registers: {folders_text(attempts)}; open one, or {_adopting(run)}"


def _latest(store: Store) -> Operations[AttemptId | None]:
    yield NOW
    target = link_target(store, LATEST)
    found = parse_folder(target) if target is not None else None
    return None if found is None else found[0]


def _adopting(run: str) -> str:
    return f"call `ckpt-convert adopt {run}`, or ek.adopt({run!r})"


def _advice(store: Store, standing: RunSurvey, why: str) -> str:
    run = path_in(store, "").rstrip("/")
    found = standing.unregistered or standing.registered
    example = f"{run}/{max(found, key=lambda one: (one.epoch, one)).folder}"
    loading = f"ek.load(state, {example!r})"
    if standing.epochs.newest:
        loading = f"copy {example} to a place outside of the run, and call ek.load(state, COPY)"
    whole = "1 folder holds a whole checkpoint" if len(found) == 1 else f"{len(found)} folders hold whole checkpoints"
    return (
        f"{run}: {why}, and {whole}: {folders_text(found)}. Expected a register under commits/ for each; a job that went on "
        f"would begin anew beside them, so nothing was claimed or changed. To load one: {loading}; to have all that verify "
        f"count again: {_adopting(run)}; to begin anew: take another root"
    )
