"""When does the checkpoint exist? The one door to a commit, for `save`, `async_save` and runs. [SAVE-3, SAVE-50..58,
SAVE-80..90]

    attested --prove--> proven --record--> recorded --publish--> committed --confirm--> settled
    bereft ------find records---------------^                       ^
    found ------------------------find commit-----------------------'

`publish` is the one operation of the store that makes the commit, and only one of all committers can win it: by path the
draft's rename to the path, in a run the creation of the register that says commit. Before it an attempt can be given up,
likewise by one operation, the rename of the draft to an aborted one or a register that says abort. Whoever finds that another
was first obeys.

1. `STEPS` drives the commit: a state without a row in it is an error, and nothing is published.
2. A committer begins `attested` if it knows the contents, `bereft` if another one must have made the records, `found` if the
   attempt stands committed. After an error before `committed` it looks again, as another one may have been first.
3. What fails in `committed` undoes nothing: it is said of a checkpoint that stands (`STANDS`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from elastickpt.commit.attempt import Attempt, Committed, Verdict
from elastickpt.commit.attest import DraftContents, left_contents
from elastickpt.commit.draft import CONTENTS, abort
from elastickpt.commit.draft import commit as commit_draft
from elastickpt.commit.record import Proven, Records, find_records, prove_draft, read_records, write_records
from elastickpt.errors import (
    CheckpointError,
    InternalError,
    MissingFile,
    NoSpace,
    NotAcknowledged,
    NotDurable,
    RankFailure,
    StorageFailed,
    Superseded,
    Uncommitted,
)
from elastickpt.format.encode_manifest import decode_manifest
from elastickpt.format.keys import DRAFT_TOKEN, MANIFEST
from elastickpt.format.records import FileDigest
from elastickpt.format.version import MAX_MANIFEST_NBYTES
from elastickpt.ledger.epochs import Acknowledgement, acknowledge, decide, superseded
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete, remove_folder
from elastickpt.ledger.records import AbortRegister, CommitRegister
from elastickpt.ledger.stored import read_register
from elastickpt.ranks.team import failure_of
from elastickpt.storage.store import Store

T = TypeVar("T")


class AttemptStanding(StrEnum):
    """What an attempt is, for everybody who looks."""

    OPEN = "open"
    COMMITTED = "committed"  # by path: the draft was renamed to the path; in a run: the register says commit
    ABORTED = "aborted"  # by path: the draft is gone, or was renamed; in a run: the register says abort


class CommitState(StrEnum):
    """How far one committer is with it."""

    ATTESTED = "attested"  # every writer's fragment file is durable, and the contents are known
    PROVEN = "proven"  # every element of every array is stored exactly once
    BEREFT = "bereft"  # the contents are not known: another committer has made the records, or nobody can
    RECORDED = "recorded"  # index, documents and manifest are durable in the draft
    FOUND = "found"  # it stands committed, by another committer or by this one before it lost its memory
    COMMITTED = "committed"
    SETTLED = "settled"  # its name is durable; in a run it is acknowledged


@dataclass(frozen=True, slots=True)
class Patience:
    """How a committer waits for a newer claim of the run to adopt: looks each `poll_s`, at most `limit_s`. [RUN-43]"""

    poll_s: float = 0.2
    limit_s: float = 60.0


# Raised of an attempt that stands committed: it cannot be given up, and its sync is not repeated.
STANDS = (NotAcknowledged, NotDurable, Superseded)


def look(store: Store, attempt: Attempt) -> AttemptStanding:
    """What has become of the attempt so far. Blocking. Raises StorageFailed kinds."""
    if attempt.register is not None:
        try:
            register = complete(read_register(store, attempt.register))
        except MissingFile:
            return AttemptStanding.OPEN
        return AttemptStanding.COMMITTED if isinstance(register, CommitRegister) else AttemptStanding.ABORTED
    if store.exists(attempt.draft.folder):  # first this: it may be renamed between two looks
        return AttemptStanding.OPEN
    try:
        found = decode_manifest(store.read(f"{attempt.draft.name}/{MANIFEST}", MAX_MANIFEST_NBYTES), path=MANIFEST)
    except MissingFile:
        return AttemptStanding.ABORTED
    return AttemptStanding.COMMITTED if found.attempt == attempt.id else AttemptStanding.ABORTED


# -- commit ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Committer:
    """What one committer knows of the attempt on the way through `STEPS`."""

    store: Store
    attempt: Attempt
    contents: DraftContents | None
    files: Sequence[FileDigest]
    patience: Patience
    proven: Proven | None = None
    records: Records | None = None


def commit(
    store: Store,
    attempt: Attempt,
    contents: DraftContents | None,
    files: Sequence[FileDigest],
    *,
    patience: Patience = Patience(),
) -> Committed:
    """Commits the attempt, whose writers have all attested with `files`, or finds that it is committed: on return the
    checkpoint exists, as durable as was asked. Blocking.

    `contents` None: they are read from the draft, as another committer has left them. Raises what `prove_draft` and
    `write_records` raise, PathOccupied if the path was taken meanwhile, StorageFailed kinds; Uncommitted if it is aborted. Of a
    commit that stands: NotDurable, in a run Superseded and NotAcknowledged.
    """
    committer = _Committer(store, attempt, contents, files, patience)
    standing = look(store, attempt)
    if standing is AttemptStanding.OPEN:
        try:
            return _go_through(committer, _beginning(committer))
        except STANDS:
            raise  # looking again makes it no more durable, and finds no other claim
        except CheckpointError as error:
            try:
                standing = look(store, attempt)  # another may have been first, which shows in any operation
            except CheckpointError:
                raise error from None  # which says what is known [SAVE-56]
            if standing is AttemptStanding.OPEN:
                raise
    if standing is AttemptStanding.ABORTED:
        raise Uncommitted(f"{attempt.where}: the attempt {attempt.id} was aborted by another writer")
    return _go_through(committer, CommitState.FOUND)


def _beginning(committer: _Committer) -> CommitState:
    if committer.contents is None:
        committer.contents = left_contents(committer.store, committer.attempt)
    return CommitState.ATTESTED if committer.contents is not None else CommitState.BEREFT


def _go_through(committer: _Committer, state: CommitState) -> Committed:
    while state is not CommitState.SETTLED:
        step = STEPS.get(state)
        if step is None:
            raise InternalError(f"{committer.attempt.where}: no step leads on from {state}; please report it")
        step.act(committer)
        state = step.then
    found = _known(committer.records)
    return Committed(found.nbytes, len(found.arrays), found.digest)


def _prove(committer: _Committer) -> None:
    contents = _known(committer.contents)
    committer.proven = prove_draft(committer.store, committer.attempt, contents, committer.files)


def _record(committer: _Committer) -> None:
    contents, proven = _known(committer.contents), _known(committer.proven)
    committer.records = write_records(committer.store, committer.attempt, contents, committer.files, proven)


def _find_records(committer: _Committer) -> None:
    committer.records = find_records(committer.store, committer.attempt)


def _publish(committer: _Committer) -> None:
    """The commit point."""
    store, attempt, records = committer.store, committer.attempt, _known(committer.records)
    if attempt.register is None:
        return commit_draft(store, attempt.draft)
    register = CommitRegister(attempt.register, records.digest, records.nbytes, records.manifest.time, attempt.metrics)
    try:
        said = complete(decide(store, register))
    except StorageFailed as error:
        if look(store, attempt) is not AttemptStanding.COMMITTED:
            raise
        raise NotDurable(f"{attempt.where} is committed and whole, but may not survive a power cut: {error}") from error
    if said != register:
        raise Uncommitted(f"{attempt.where}: the attempt {attempt.register} was aborted by another writer")
    return None


def _find_commit(committer: _Committer) -> None:
    store, attempt = committer.store, committer.attempt
    try:
        committer.records = read_records(store, attempt.draft.name)
    except MissingFile:
        if attempt.register is not None:
            _acknowledge(committer, attempt.register)  # swept by a newer claim, or removed since
        raise
    if attempt.register is not None:  # as durable as if this committer had created it
        complete(decide(store, complete(read_register(store, attempt.register))))


def _confirm(committer: _Committer) -> None:
    if committer.attempt.register is not None:
        _acknowledge(committer, committer.attempt.register)
    elif committer.attempt.durability == "power":
        _sync_name(committer.store, committer.attempt)


def _sync_name(store: Store, attempt: Attempt) -> None:
    """The name of a committed path is durable. Raises NotDurable. [SAVE-53, SAVE-96]"""
    try:
        store.sync_directory("")
    except CheckpointError as error:
        raise NotDurable(
            f"{attempt.where} is committed and whole, but its name may not survive a power cut: {error}"
        ) from error


def _acknowledge(committer: _Committer, register: AttemptId) -> None:
    """No newer claim of the run has left it out. Raises Superseded, NotAcknowledged. [SAVE-90]"""
    store, patience = committer.store, committer.patience
    said = complete(acknowledge(store, register, poll_s=patience.poll_s, limit_s=patience.limit_s))
    if said is Acknowledgement.ACKNOWLEDGED:
        return
    if said is Acknowledgement.SUPERSEDED:
        raise complete(superseded(store, register.epoch))
    why = "it was removed since" if said is Acknowledgement.REMOVED else "a newer claim of the run has not adopted it in time"
    raise NotAcknowledged(f"{committer.attempt.where}: committed, but not acknowledged: {why}")


@dataclass(frozen=True, slots=True)
class CommitStep:
    act: Callable[[_Committer], None]
    then: CommitState


STEPS: Mapping[CommitState, CommitStep] = {
    CommitState.ATTESTED: CommitStep(_prove, CommitState.PROVEN),
    CommitState.PROVEN: CommitStep(_record, CommitState.RECORDED),
    CommitState.BEREFT: CommitStep(_find_records, CommitState.RECORDED),
    CommitState.RECORDED: CommitStep(_publish, CommitState.COMMITTED),
    CommitState.FOUND: CommitStep(_find_commit, CommitState.COMMITTED),
    CommitState.COMMITTED: CommitStep(_confirm, CommitState.SETTLED),
}


def _known(what: T | None) -> T:
    if what is None:
        raise InternalError("a step of a commit came before the one that it needs; please report it")
    return what


# -- the other end -----------------------------------------------------------------------------------------------------


def give_up(store: Store, attempt: Attempt, report: tuple[RankFailure, ...], *, patience: Patience = Patience()) -> Verdict:
    """Aborts the attempt for good, unless it is committed: what became of it. Blocking. Raises StorageFailed kinds: then it is
    open, and nobody may rely on either; NotDurable and for a run what `commit` raises of a commit. [SAVE-55]"""
    if attempt.register is None:
        abort(store, attempt.draft)
        standing = look(store, attempt)
    else:
        standing = _abort_register(store, attempt, attempt.register, report)
    if standing is AttemptStanding.COMMITTED:
        return _go_through(_Committer(store, attempt, None, (), patience), CommitState.FOUND)
    if standing is AttemptStanding.OPEN:
        raise StorageFailed(
            f"{attempt.where}: its draft {attempt.draft.folder} cannot be aborted: a committer may still commit it"
        )
    if attempt.register is not None:
        with suppress(CheckpointError):  # the next job's sweep removes what is left
            complete(remove_folder(store, attempt.register))
    return report


def abandon(store: Store, attempt: Attempt, why: BaseException) -> None:
    """The same for whoever made the attempt, while the error `why` is on its way: raises nothing, and looks no further."""
    if attempt.register is None:
        abort(store, attempt.draft)
        return
    with suppress(Exception):
        give_up(store, attempt, (failure_of(why, 0),))


def _abort_register(store: Store, attempt: Attempt, register: AttemptId, report: tuple[RankFailure, ...]) -> AttemptStanding:
    """The register says abort, or what another said before. On a full disk the draft first gives up what no checkpoint holds:
    room for a register, as its folder may go only behind that. [RUN-76]"""
    reason = "; ".join(f"rank {one.rank} ({one.kind}): {one.message}" for one in report)[:2000]
    try:
        said = complete(decide(store, AbortRegister(register, reason)))
    except StorageFailed as error:
        if (standing := look(store, attempt)) is not AttemptStanding.OPEN:
            return standing  # it has its name, which alone failed to be synced
        if not isinstance(error, NoSpace):
            raise
        for leftover in (DRAFT_TOKEN, CONTENTS):
            store.remove(attempt.path(leftover))
        said = complete(decide(store, AbortRegister(register, reason)))
    return AttemptStanding.COMMITTED if isinstance(said, CommitRegister) else AttemptStanding.ABORTED
