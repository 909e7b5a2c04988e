"""How an attempt ends, by whichever of its writers commits it; at most one end, however many try. [SAVE-80..90]

    committed   by path: the draft has been renamed to the path        in a run: the register says commit
    aborted     by path: the draft is gone, or has been renamed        in a run: the register says abort
    open        neither

Every end is reached by one operation of the store that only one of all committers can win; whoever finds that another one was
first obeys it. All of them make the same bytes before, from the same contents and attestations.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from elastickpt.commit.cases import Case, Verdict
from elastickpt.commit.completing import completing
from elastickpt.commit.contents import Contents
from elastickpt.commit.draft import CONTENTS, abort
from elastickpt.commit.finish import publish, record, sync_name, sync_records
from elastickpt.commit.handed import left_contents
from elastickpt.commit.orders import Committed
from elastickpt.commit.states import Attempt, Event
from elastickpt.errors import (
    CheckpointError,
    MissingFile,
    NoSpace,
    NotAcknowledged,
    NotDurable,
    RankFailure,
    StorageFailed,
    Superseded,
    Uncommitted,
)
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_index import decode_index
from elastickpt.format.encode_manifest import decode_manifest
from elastickpt.format.keys import DRAFT_TOKEN, MANIFEST
from elastickpt.format.limits import MAX_MANIFEST_NBYTES
from elastickpt.format.records import ArrayRecord, FileDigest, Manifest
from elastickpt.ledger.epochs import Outcome, acknowledge, decide, superseded
from elastickpt.ledger.folders import remove_folder
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.records import Abort, Commit
from elastickpt.ledger.steps import complete
from elastickpt.ledger.stored import read_register
from elastickpt.storage.store import Store


class Standing(StrEnum):
    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Patience:
    """How a committer waits for a newer claim of the run to adopt: looks each `poll_s`, at most `limit_s`. [RUN-43]"""

    poll_s: float = 0.2
    limit_s: float = 60.0


# Raised of an attempt that stands committed: it cannot be given up, and its sync is not repeated.
STANDS = (NotAcknowledged, NotDurable, Superseded)


def look(store: Store, case: Case) -> Standing:
    """What has become of the attempt so far. Blocking. Raises StorageFailed kinds."""
    if case.register is not None:
        try:
            register = complete(read_register(store, case.register))
        except MissingFile:
            return Standing.OPEN
        return Standing.COMMITTED if isinstance(register, Commit) else Standing.ABORTED
    if store.exists(case.draft.folder):  # first this: it may be renamed between two looks
        return Standing.OPEN
    try:
        found = decode_manifest(store.read(f"{case.draft.name}/{MANIFEST}", MAX_MANIFEST_NBYTES), path=MANIFEST)
    except MissingFile:
        return Standing.ABORTED
    return Standing.COMMITTED if found.attempt == case.draft.attempt else Standing.ABORTED


def settle(
    store: Store, case: Case, contents: Contents | None, files: tuple[FileDigest, ...], *, patience: Patience
) -> Committed:
    """Commits the attempt, whose writers have all attested, or finds that it is committed. Blocking.

    `contents` None: they are read from the draft, as another committer has left them. Raises what `record` and `publish`
    raise, Uncommitted if it is aborted; for a run Superseded and NotAcknowledged, though the commit may stand.
    """
    standing = look(store, case)
    if standing is Standing.OPEN:
        try:
            return _commit(store, case, contents, files, patience)
        except STANDS:
            raise  # looking again makes it no more durable, and finds no other claim
        except CheckpointError:
            standing = look(store, case)  # another may have been first, which shows in any operation
            if standing is Standing.OPEN:
                raise
    if standing is Standing.ABORTED:
        raise Uncommitted(f"{case.where}: the attempt {case.draft.attempt} was aborted by another writer")
    return _confirm(store, case, patience)


def give_up(store: Store, case: Case, report: tuple[RankFailure, ...], *, patience: Patience) -> Verdict:
    """Aborts the attempt for good, unless it is committed: what became of it. Blocking. Raises StorageFailed kinds: then it is
    open, and nobody may rely on either; NotDurable and for a run what `settle` raises of a commit."""
    if case.register is None:
        abort(store, case.draft)
        standing = look(store, case)
    else:
        standing = _abort_register(store, case, case.register, report)
    if standing is Standing.COMMITTED:
        return _confirm(store, case, patience)
    if standing is Standing.OPEN:
        raise StorageFailed(f"{case.where}: its draft {case.draft.folder} cannot be aborted: a committer may still commit it")
    if case.register is not None:
        with suppress(CheckpointError):  # the next sweep removes what is left
            complete(remove_folder(store, case.register))
    return report


def _abort_register(store: Store, case: Case, register: AttemptId, report: tuple[RankFailure, ...]) -> Standing:
    """The register says abort, or what another said before. On a full disk the draft first gives up what no checkpoint holds:
    room for a register, as its folder may go only behind that. [RUN-76]"""
    reason = "; ".join(f"rank {one.rank} ({one.kind}): {one.message}" for one in report)[:2000]
    try:
        said = complete(decide(store, Abort(register, reason)))
    except StorageFailed as error:
        if (standing := look(store, case)) is not Standing.OPEN:
            return standing  # it has its name, which alone failed to be synced
        if not isinstance(error, NoSpace):
            raise
        for leftover in (DRAFT_TOKEN, CONTENTS):
            store.remove(case.draft.path(leftover))
        said = complete(decide(store, Abort(register, reason)))
    return Standing.COMMITTED if isinstance(said, Commit) else Standing.ABORTED


def _commit(
    store: Store, case: Case, contents: Contents | None, files: tuple[FileDigest, ...], patience: Patience
) -> Committed:
    contents = contents or left_contents(store, case)
    attempt = Attempt()
    attempt.advance(Event.DRAFT)
    if contents is None:
        manifest, digest, arrays = _found_records(store, case)
        for event in (Event.ATTEST, Event.PROVE, Event.RECORD):
            attempt.advance(event)
    else:
        recorded = record(
            store, case.draft, contents, files, durability=case.durability, attempt=attempt, create=completing(store)
        )
        manifest, digest, arrays = recorded.manifest, recorded.digest, contents.outline.arrays
    committed = Committed(_nbytes(arrays), len(arrays), digest)
    if case.register is None:
        publish(store, case.draft, durability=case.durability, attempt=attempt)
        return committed
    register = Commit(case.register, digest, committed.nbytes, manifest.time, case.metrics)
    try:
        said = complete(decide(store, register))
    except StorageFailed as error:
        if look(store, case) is not Standing.COMMITTED:
            raise
        raise NotDurable(f"{case.where} is committed and whole, but may not survive a power cut: {error}") from error
    if said != register:
        raise Uncommitted(f"{case.where}: the attempt {case.register} was aborted by another writer")
    attempt.advance(Event.PUBLISH)
    _acknowledge(store, case, patience)
    return committed


def _found_records(store: Store, case: Case) -> tuple[Manifest, str, tuple[ArrayRecord, ...]]:
    """The records that another committer made, whole and durable. Raises MissingFile, Damaged kinds."""
    data = store.read(case.draft.path(MANIFEST), MAX_MANIFEST_NBYTES)
    manifest = decode_manifest(data, path=MANIFEST)
    if manifest.attempt != case.draft.attempt:
        raise Uncommitted(f"{case.where}: the draft holds the manifest of attempt {manifest.attempt}")
    arrays = _indexed(store, case.draft.folder, manifest)
    if case.durability == "power":
        sync_records(store, case.draft, [MANIFEST, *(entry.file.path for entry in manifest.index)])
    return manifest, file_digest(data), arrays


def _indexed(store: Store, folder: str, manifest: Manifest) -> tuple[ArrayRecord, ...]:
    parts = [
        decode_index(store.read(f"{folder}/{one.file.path}", MAX_MANIFEST_NBYTES), path=one.file.path) for one in manifest.index
    ]
    return tuple(record for part in parts for record in part.arrays)


def _nbytes(arrays: tuple[ArrayRecord, ...]) -> int:
    return sum(one.spec.nbytes for one in arrays)


def _confirm(store: Store, case: Case, patience: Patience) -> Committed:
    """What was committed by another committer, or by this one before it lost its memory; made durable, and acknowledged."""
    try:
        data = store.read(f"{case.draft.name}/{MANIFEST}", MAX_MANIFEST_NBYTES)
        arrays = _indexed(store, case.draft.name, decode_manifest(data, path=MANIFEST))
    except MissingFile:
        _acknowledge(store, case, patience)  # swept by a newer claim, or removed since
        raise
    committed = Committed(_nbytes(arrays), len(arrays), file_digest(data))
    if case.register is None:
        if case.durability == "power":
            sync_name(store, case.draft)
        return committed
    complete(decide(store, complete(read_register(store, case.register))))
    _acknowledge(store, case, patience)
    return committed


def _acknowledge(store: Store, case: Case, patience: Patience) -> None:
    if case.register is None:
        return
    outcome = complete(acknowledge(store, case.register, poll_s=patience.poll_s, limit_s=patience.limit_s))
    if outcome is Outcome.ACKNOWLEDGED:
        return
    if outcome is Outcome.SUPERSEDED:
        raise complete(superseded(store, case.register.epoch))
    why = "it was removed since" if outcome is Outcome.REMOVED else "a newer claim of the run has not adopted it in time"
    raise NotAcknowledged(f"{case.where}: committed, but not acknowledged: {why}")
