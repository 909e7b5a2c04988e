"""What stands in a run, as it is found: names, objects, and all that counts of it at one moment. Reads only. [RUN-50..54]"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from elastickpt.errors import Damaged, MissingFile
from elastickpt.ledger.names import (
    COMMITS,
    AttemptId,
    RunObjects,
    adopted_name,
    claim_name,
    commits_path,
    found_name,
    listing_of,
    parse_folder,
    start_name,
)
from elastickpt.ledger.objects import NOW, Operations
from elastickpt.ledger.records import (
    MAX_OBJECT_NBYTES,
    AbortRegister,
    Adopted,
    Claim,
    CommitRegister,
    EpochStart,
    Found,
    Metrics,
    Void,
    decode_adopted,
    decode_claim,
    decode_metrics,
    decode_nothing_loaded,
    decode_register,
    decode_start,
)
from elastickpt.storage.store import Store


@dataclass(frozen=True, slots=True)
class Folders:
    """Whose folders stand in the run's root, and whose are being removed; rising."""

    attempts: tuple[AttemptId, ...]
    swept: tuple[AttemptId, ...]


@dataclass(frozen=True, slots=True)
class Broken:
    """A commit that counts and cannot be loaded: its register is not what was written, or its folder is gone."""

    id: AttemptId
    why: str


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at one moment. `commits` are those that count, rising; `starts` those of the live branch, by epoch."""

    newest: Adopted | None
    commits: tuple[CommitRegister | Broken, ...]
    metrics: Mapping[AttemptId, Metrics]
    starts: Mapping[int, AttemptId | None]


def read_view(store: Store) -> Operations[RunView]:
    """All that counts, as of one listing. The store is the run's root; a run that nobody claimed is empty.

    Raises Damaged kinds for an adopted, start or metrics object that is not what was written: nothing is guessed. [RUN-54]
    """
    listing = yield from list_commits(store)
    newest = yield from newest_adopted(store, listing, before=listing.newest + 1)
    commits: list[CommitRegister | Broken] = []
    metrics: dict[AttemptId, Metrics] = {}
    if newest is not None:
        own = [one for one in listing.registers if one.epoch == newest.epoch]
        for attempt in sorted({*newest.commits, *own}):  # adopted ones whether listed or not: the listing may be older [RUN-50]
            found = yield from _commit(store, attempt)
            commits += [found] if found is not None else []
        commits = yield from _standing(store, commits)
        for one in commits:
            metrics[one.id] = yield from _all_metrics(store, listing, one)
    oldest = min((one.id.epoch for one in commits), default=0)
    starts = yield from _starts(store, listing, newest, oldest=oldest)
    return RunView(newest, tuple(commits), MappingProxyType(metrics), MappingProxyType(starts))


def _commit(store: Store, attempt: AttemptId) -> Operations[CommitRegister | Broken | None]:
    """None for what was aborted or removed."""
    try:
        register = yield from read_register(store, attempt)
    except MissingFile:
        return None
    except Damaged as problem:
        return Broken(attempt, str(problem))
    return register if isinstance(register, CommitRegister) else None


def _standing(store: Store, commits: list[CommitRegister | Broken]) -> Operations[list[CommitRegister | Broken]]:
    """The commits less those that were removed meanwhile; one whose folder is gone though its register stands is broken.

    It was linked once more by a late writer behind its removal, or somebody removed the folder by hand. [RUN-51]
    """
    folders = frozenset((yield from attempt_folders(store)).attempts)
    standing: list[CommitRegister | Broken] = []
    for one in commits:
        if one.id in folders:
            standing.append(one)
        elif (yield from _commit(store, one.id)) is not None:
            standing.append(Broken(one.id, f"{one.id.folder}: the folder is gone, its register stands"))
    return standing


def _all_metrics(store: Store, listing: RunObjects, commit: CommitRegister | Broken) -> Operations[Metrics]:
    found = dict(commit.metrics) if isinstance(commit, CommitRegister) else {}
    for number in listing.metrics_of(commit.id):
        yield NOW
        try:
            data = store.read(commits_path(commit.id.metrics(number)), MAX_OBJECT_NBYTES)
        except MissingFile:
            continue
        found |= decode_metrics(data, attempt=commit.id, number=number).metrics
    return tuple(sorted(found.items()))


def _starts(
    store: Store, listing: RunObjects, newest: Adopted | None, *, oldest: int
) -> Operations[dict[int, AttemptId | None]]:
    """From the newest epoch that has started, along what it continued from, until no commit is left below."""
    starts: dict[int, AttemptId | None] = {}
    epoch = max((one for one in listing.starts if newest is not None and one <= newest.epoch), default=0)  # [RUN-52]
    while epoch and epoch >= oldest:
        found = yield from read_start(store, epoch)
        starts[epoch] = found.continued
        epoch = found.continued.epoch if found.continued is not None else 0
    return starts


# -- one by one ------------------------------------------------------------------------------------------------------------


def list_commits(store: Store) -> Operations[RunObjects]:
    """The names under `commits/`; none where nobody ever claimed."""
    yield NOW
    try:
        return listing_of(store.entries(COMMITS))
    except MissingFile:
        return listing_of(())


def attempt_folders(store: Store) -> Operations[Folders]:
    """The folders of attempts in the run's root."""
    yield NOW
    found = [parse_folder(entry.name) for entry in store.entries("") if entry.kind == "directory"]
    return Folders(
        tuple(sorted(one[0] for one in found if one is not None and one[1] == "attempt")),
        tuple(sorted(one[0] for one in found if one is not None and one[1] == "swept")),
    )


def read_claim(store: Store, epoch: int) -> Operations[Claim]:
    yield NOW
    return decode_claim(store.read(commits_path(claim_name(epoch)), MAX_OBJECT_NBYTES), epoch=epoch)


def read_adopted(store: Store, epoch: int) -> Operations[Adopted | Void]:
    yield NOW
    return decode_adopted(store.read(commits_path(adopted_name(epoch)), MAX_OBJECT_NBYTES), epoch=epoch)


def read_start(store: Store, epoch: int) -> Operations[EpochStart]:
    yield NOW
    return decode_start(store.read(commits_path(start_name(epoch)), MAX_OBJECT_NBYTES), epoch=epoch)


def read_nothing_loaded(store: Store, epoch: int) -> Operations[Found]:
    yield NOW
    return decode_nothing_loaded(store.read(commits_path(found_name(epoch)), MAX_OBJECT_NBYTES), epoch=epoch)


def newest_adopted(store: Store, listing: RunObjects, *, before: int) -> Operations[Adopted | None]:
    """The adopted object of the newest epoch below `before` that has a non-void one."""
    for epoch in sorted(listing.adopted, reverse=True):
        if epoch < before:
            found = yield from read_adopted(store, epoch)
            if isinstance(found, Adopted):
                return found
    return None


def read_register(store: Store, attempt: AttemptId) -> Operations[CommitRegister | AbortRegister]:
    yield NOW
    return decode_register(store.read(commits_path(attempt.register), MAX_OBJECT_NBYTES), attempt=attempt)
