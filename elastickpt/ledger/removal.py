"""What goes from a run: commits that retention gives up, and dead attempts. [RUN-70..79, RUN-104]

A commit: the record first, durably, then what it named; a newer claim stops it before the next record. A dead attempt is what
never was, or never again will be, a commit that counts:

folder without a manifest, of an older epoch      swept: whatever is linked for it now is inert
folder without a register, of this epoch          its register says abort first; if that says commit, it stays
register says abort                               folder swept; the register goes once its epoch is superseded
folder with a manifest, of an older epoch, whose
  register is not there or does not count         swept once the live branch has its step or a later one: it may be whole
temporary file whose name is taken, or whose epoch is superseded: swept
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from elastickpt.errors import CheckpointError, Damaged, MissingFile, Superseded
from elastickpt.format.keys import MANIFEST
from elastickpt.ledger.epochs import Holding, counts, decide, require_newest
from elastickpt.ledger.names import AttemptId, RunObjects, commits_path, listing_of, parse_name, parse_temporary
from elastickpt.ledger.objects import NOW, Operations, remove_folder, remove_register
from elastickpt.ledger.records import AbortRegister, CommitRegister
from elastickpt.ledger.stored import Folders, attempt_folders, read_register
from elastickpt.ledger.unregistered import live_step
from elastickpt.storage.store import Entry, Store


def remove_commits(store: Store, holding: Holding, *, commits: Iterable[AttemptId]) -> Operations[tuple[AttemptId, ...]]:
    """The commits are gone, one after the other in the order given. Returns them.

    Raises Superseded before the first one that a newer claim forbids, StorageFailed kinds; what was begun is inert then, and
    the next sweep ends it.
    """
    removed = []
    for attempt in commits:
        yield from remove_commit(store, holding, attempt=attempt)
        removed.append(attempt)
    return tuple(removed)


def remove_commit(store: Store, holding: Holding, *, attempt: AttemptId) -> Operations[None]:
    """The commit is gone: its register, its metrics, its folder, in that order."""
    listing = yield from require_newest(store, holding.epoch)  # [RUN-72]
    yield from remove_register(store, attempt)  # [RUN-70]
    yield from remove_metrics(store, listing, attempt)
    yield from remove_folder(store, attempt)
    yield NOW
    if store.exists(commits_path(attempt.register)):  # linked once more by a late writer, before the folder went [RUN-73]
        yield from remove_register(store, attempt)


def remove_metrics(store: Store, listing: RunObjects, attempt: AttemptId) -> Operations[None]:
    for number in listing.metrics_of(attempt):
        yield NOW
        store.remove(commits_path(attempt.metrics(number)))


@dataclass(frozen=True, slots=True)
class SweepReport:
    """Attempts of which nothing is left but, at most, a register that says abort; those of them that had a manifest, and that
    the live branch has passed; those with a manifest that wait for that; those left, with the reason."""

    removed: tuple[AttemptId, ...]
    passed: tuple[AttemptId, ...]
    waiting: tuple[AttemptId, ...]
    left: tuple[tuple[AttemptId, str], ...]


class _Fate(Enum):
    STAYS = auto()
    DEAD = auto()
    PASSED = auto()
    WAITS = auto()


def sweep(store: Store, holding: Holding, *, in_flight: Collection[AttemptId] = ()) -> Operations[SweepReport]:
    """Removes dead attempts, but for those `in_flight` in this job. One that cannot be removed is left, and named.

    Raises Superseded when a newer claim is seen, which is looked for before each attempt; StorageFailed for listings.
    """
    folders = yield from attempt_folders(store)
    listing = yield from require_newest(store, holding.epoch)
    known = {*folders.attempts, *folders.swept, *listing.registers, *(attempt for attempt, _ in listing.metrics)}
    fates: dict[AttemptId, _Fate] = {}
    left: list[tuple[AttemptId, str]] = []
    for attempt in sorted(known):
        if attempt in in_flight or attempt.epoch > holding.epoch:
            continue
        try:
            fate = yield from _fate(store, holding, listing, attempt=attempt, folders=folders)
            if fate in (_Fate.DEAD, _Fate.PASSED):
                fate = yield from _sweep_one(store, holding, listing, attempt=attempt, fate=fate, folders=folders)
        except Superseded:
            raise
        except CheckpointError as problem:
            left.append((attempt, str(problem)))
        else:
            fates[attempt] = fate
    yield from _sweep_temporaries(store, holding, listing)
    gone = (_Fate.DEAD, _Fate.PASSED)
    return SweepReport(
        tuple(attempt for attempt, fate in fates.items() if fate in gone),
        tuple(attempt for attempt, fate in fates.items() if fate is _Fate.PASSED),
        tuple(attempt for attempt, fate in fates.items() if fate is _Fate.WAITS),
        tuple(left),
    )


def _fate(store: Store, holding: Holding, listing: RunObjects, *, attempt: AttemptId, folders: Folders) -> Operations[_Fate]:
    """What is to become of an attempt, by its register and its folder; nothing is changed yet."""
    has_folder = attempt in folders.attempts or attempt in folders.swept
    registered, own = attempt in listing.registers, attempt.epoch == holding.epoch
    if registered and counts(attempt, holding.adopted):
        if not own or not has_folder:
            return _Fate.STAYS
        try:
            return _Fate.STAYS if isinstance((yield from read_register(store, attempt)), CommitRegister) else _Fate.DEAD
        except (Damaged, MissingFile):  # not ours to judge; or removed by retention at this moment
            return _Fate.STAYS
    if own or attempt not in folders.attempts:
        return _Fate.DEAD
    if registered and (yield from _says_abort(store, attempt)):
        return _Fate.DEAD
    yield NOW
    if not store.exists(f"{attempt.folder}/{MANIFEST}"):
        return _Fate.DEAD
    return _Fate.PASSED if attempt.step <= (yield from live_step(store)) else _Fate.WAITS  # [RUN-104]


def _says_abort(store: Store, attempt: AttemptId) -> Operations[bool]:
    try:
        return isinstance((yield from read_register(store, attempt)), AbortRegister)
    except Damaged:
        return False


def _sweep_one(
    store: Store, holding: Holding, listing: RunObjects, *, attempt: AttemptId, fate: _Fate, folders: Folders
) -> Operations[_Fate]:
    """An attempt that is to go is gone; its fate, which another answer in its register may have changed."""
    has_folder = attempt in folders.attempts or attempt in folders.swept
    registered, own = attempt in listing.registers, attempt.epoch == holding.epoch
    yield from require_newest(store, holding.epoch)
    if registered and not own:
        yield from remove_register(store, attempt)  # [RUN-77] not adopted: it never counts again
    elif not registered and own and has_folder:
        said = yield from decide(store, AbortRegister(attempt, "swept: nobody works on it"))  # [RUN-76]
        if isinstance(said, CommitRegister):
            return _Fate.STAYS
    yield from remove_metrics(store, listing, attempt)
    if has_folder:
        yield from remove_folder(store, attempt)
    return fate


def _sweep_temporaries(store: Store, holding: Holding, listing: RunObjects) -> Operations[None]:
    for temporary in listing.temporaries:
        target = parse_temporary(temporary)
        name = parse_name(target) if target is not None else None
        if target is None or name is None:
            continue
        taken = listing_of([Entry(target, "file", 0)])
        if name.epoch < holding.epoch or (
            taken.claims <= listing.claims
            and taken.adopted <= listing.adopted
            and taken.starts <= listing.starts
            and taken.founds <= listing.founds
            and taken.registers <= listing.registers
            and taken.metrics <= listing.metrics
        ):
            yield NOW
            store.remove(commits_path(temporary))
