"""Dead attempts go: what never was, or never again will be, a commit that counts. [RUN-75..79]

folder without a register, of an older epoch      swept: whatever is linked for it now is inert
folder without a register, of this epoch          its register says abort first; if that says commit, it stays
register says abort                               folder swept; the register goes once its epoch is superseded
register says commit, does not count              register and folder swept
temporary file whose name is taken, or whose epoch is superseded: swept
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from elastickpt.commit.registers.create import remove_register
from elastickpt.commit.registers.epochs import Holding, counts, decide, require_newest
from elastickpt.commit.registers.folders import remove_folder
from elastickpt.commit.registers.names import AttemptId, Listing, commits_path, listing_of, parse_name, parse_temporary
from elastickpt.commit.registers.records import Abort, Commit
from elastickpt.commit.registers.steps import NOW, Steps
from elastickpt.commit.registers.stored import Folders, attempt_folders, read_register
from elastickpt.errors import CheckpointError, Damaged, MissingFile, Superseded
from elastickpt.runs.removal import remove_metrics
from elastickpt.storage.store import Entry, Store


@dataclass(frozen=True, slots=True)
class SweepReport:
    """Attempts of which nothing is left but, at most, a register that says abort; and those left, with the reason."""

    removed: tuple[AttemptId, ...]
    left: tuple[tuple[AttemptId, str], ...]


def sweep(store: Store, holding: Holding, *, in_flight: Collection[AttemptId] = ()) -> Steps[SweepReport]:
    """Removes dead attempts, but for those `in_flight` in this job. One that cannot be removed is left, and named.

    Raises Superseded when a newer claim is seen, which is looked for before each attempt; StorageFailed for listings.
    """
    folders = yield from attempt_folders(store)
    listing = yield from require_newest(store, holding.epoch)
    known = {*folders.attempts, *folders.swept, *listing.registers, *(attempt for attempt, _ in listing.metrics)}
    removed: list[AttemptId] = []
    left: list[tuple[AttemptId, str]] = []
    for attempt in sorted(known):
        if attempt in in_flight or attempt.epoch > holding.epoch:
            continue
        try:
            gone = yield from _sweep_one(store, holding, listing, attempt=attempt, folders=folders)
        except Superseded:
            raise
        except CheckpointError as problem:
            left.append((attempt, str(problem)))
        else:
            removed += [attempt] if gone else []
    yield from _sweep_temporaries(store, holding, listing)
    return SweepReport(tuple(removed), tuple(left))


def _sweep_one(store: Store, holding: Holding, listing: Listing, *, attempt: AttemptId, folders: Folders) -> Steps[bool]:
    """Whether the attempt was dead, and something of it was removed."""
    has_folder = attempt in folders.attempts or attempt in folders.swept
    registered = attempt in listing.registers
    if registered and counts(attempt, holding.adopted):
        if attempt.epoch < holding.epoch or not has_folder:
            return False
        try:
            if isinstance((yield from read_register(store, attempt)), Commit):
                return False
        except (Damaged, MissingFile):  # not ours to judge; or removed by retention at this moment
            return False
    yield from require_newest(store, holding.epoch)
    if registered and attempt.epoch < holding.epoch:
        yield from remove_register(store, attempt)  # [RUN-77] not adopted: it never counts again
    elif not registered and attempt.epoch == holding.epoch and has_folder:
        said = yield from decide(store, Abort(attempt, "swept: nobody works on it"))  # [RUN-76]
        if isinstance(said, Commit):
            return False
    yield from remove_metrics(store, listing, attempt)
    if has_folder:
        yield from remove_folder(store, attempt)
    return True


def _sweep_temporaries(store: Store, holding: Holding, listing: Listing) -> Steps[None]:
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
            and taken.registers <= listing.registers
            and taken.metrics <= listing.metrics
        ):
            yield NOW
            store.remove(commits_path(temporary))
