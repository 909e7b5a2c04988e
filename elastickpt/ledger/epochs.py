"""Epochs: which commits of a run count, whoever wrote them and wherever he stopped. [RUN-30..49]

A job claims the run, each step durable before the next:

    1. create `epoch-<n>.json`, n one above the highest claim; if somebody else has it, list again       -> claimed
    2. create `epoch-<k>.adopted.json` = void for every k < n that has none                              -> older are closed
    3. list the commits                                                                                  -> listed
    4. create `epoch-<n>.adopted.json`: of what the newest non-void epoch b < n adopted, and of b's own
       commits, those that are there                                                                     -> adopted
       finding it void: a newer claim was here                                                           -> superseded
    5. choose a commit of the live branch; create `epoch-<n>.start.json` with it                         -> started

Every object is created exclusively, once, and never changed. Before 4 the job writes nothing else, before 5 no attempt.

A commit counts iff it is of the newest epoch with a non-void adopted object, or in that object.

A writer whose commit record is linked looks for a newer claim:

    none                                                             -> acknowledged
    the newest claim's adopted object is there and lists the commit  -> acknowledged
    it is there and does not list it                                 -> superseded: never counts
    it is not there, or void                                         -> looks again; at its limit: undecided

Why no acknowledged commit is lost: it was linked before the writer found no newer claim, so every later claim lists it at 3;
by 2 nobody older adopts afterwards, so b is the same for all who adopt above it, and adopts or owns the commit. Why none comes
back: an adopted object takes over only what counted in b, and b never changes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil

from elastickpt.errors import CheckpointError, Damaged, MissingFile, PathOccupied, Refused, Superseded
from elastickpt.ledger.names import COMMITS, AttemptId, RunObjects, adopted_name, claim_name, found_name, start_name
from elastickpt.ledger.objects import NOW, Operations, create_exclusively, remove_register
from elastickpt.ledger.records import (
    AbortRegister,
    Adopted,
    Claim,
    Claimer,
    CommitRegister,
    EpochStart,
    Found,
    Void,
    decode_register,
    decode_start,
    encode_adopted,
    encode_claim,
    encode_nothing_loaded,
    encode_register,
    encode_start,
)
from elastickpt.ledger.stored import (
    attempt_folders,
    list_commits,
    newest_adopted,
    read_adopted,
    read_claim,
    read_register,
)
from elastickpt.storage.store import Store


class Acknowledgement(StrEnum):
    """What a writer may say of a commit that it linked."""

    ACKNOWLEDGED = "acknowledged"  # it counts, and no claim can take that away
    SUPERSEDED = "superseded"  # it does not count and never will
    UNDECIDED = "undecided"  # a newer claim has not adopted within the limit: not acknowledged, though it may come to count
    REMOVED = "removed"  # retention has removed it since


@dataclass(frozen=True, slots=True)
class Holding:
    """A job that adopted: it may write into the run until a newer claim exists."""

    epoch: int
    by: Claimer
    adopted: Adopted


def counts(attempt: AttemptId, newest: Adopted | None) -> bool:
    """Whether a commit counts, given the adopted object of the newest epoch that has a non-void one. [RUN-30]"""
    return newest is not None and (attempt.epoch == newest.epoch or attempt in newest.commits)


# -- a job -----------------------------------------------------------------------------------------------------------------


def claim(store: Store, by: Claimer, *, adopting: Collection[AttemptId] = ()) -> Operations[Holding]:
    """The run belongs to `by` from now on; what older epochs commit after this is inert. The store is the run's root.

    `adopting`: attempts of claimed epochs that count from now on too, once they have a register that says commit. [RUN-105]
    Raises Superseded if a newer claim closed this one meanwhile, StorageFailed kinds; after an error claim anew.
    """
    epoch = yield from _take_number(store, by)
    yield from _close_older(store, epoch)
    adopted = yield from _what_counts(store, epoch, by.token, adopting)
    data = encode_adopted(adopted)
    found = yield from create_exclusively(store, adopted_name(epoch), data)
    if found != data:  # [RUN-36]
        raise (yield from superseded(store, epoch))
    return Holding(epoch, by, adopted)


def start(
    store: Store, holding: Holding, *, continued: AttemptId | None, keep: str | None = None, found: Found | None = None
) -> Operations[EpochStart]:
    """The live branch goes on from `continued` from now on, or begins anew. Once in an epoch, before its first attempt.

    `keep`, in words, and what the restore `found` are remembered with it: they decide nothing. Returns what stands: a second
    start from the same commit changes nothing. Raises Superseded, Refused for a second start from elsewhere, Damaged kinds for
    a first one that is not what was written, StorageFailed kinds. [RUN-37]
    """
    yield from require_newest(store, holding.epoch)
    if continued is not None and continued not in holding.adopted.commits:
        raise Refused(f"epoch {holding.epoch} cannot continue from {continued}, which it did not adopt")
    data = encode_start(EpochStart(holding.epoch, continued, keep, found))
    record = decode_start((yield from create_exclusively(store, start_name(holding.epoch), data)), epoch=holding.epoch)
    if record.continued != continued:
        raise Refused(f"epoch {holding.epoch} has started already, from another commit than {continued}")
    return record


def remember(store: Store, holding: Holding, found: Found) -> Operations[None]:
    """What a restore that loaded nothing found stands in the run; it decides nothing. Raises Superseded, StorageFailed kinds.
    [RUN-69]"""
    yield from require_newest(store, holding.epoch)
    data = encode_nothing_loaded(holding.epoch, found)
    yield from create_exclusively(store, found_name(holding.epoch), data)


def open_attempt(store: Store, holding: Holding, *, step: int) -> Operations[AttemptId]:
    """The id of a new attempt at `step`; older ones of this epoch at it say abort from now on.

    Raises PathOccupied if the step is committed in this epoch, Refused before the start or behind a committed step,
    Superseded, StorageFailed kinds. [RUN-38, RUN-39]
    """
    listing = yield from require_newest(store, holding.epoch)
    if holding.epoch not in listing.starts:
        raise Refused(f"epoch {holding.epoch} has not started")
    mine = sorted(one for one in listing.registers if one.epoch == holding.epoch)
    for one in reversed(mine):
        if one.step < step:
            break
        register = yield from read_register(store, one)
        if isinstance(register, CommitRegister):
            if one.step == step:
                raise PathOccupied(f"step {step} is committed in epoch {holding.epoch} already")
            raise Refused(
                f"step {step} lies behind step {one.step}, which epoch {holding.epoch} has committed; roll back first"
            )
    tried = [one.attempt for one in mine if one.step == step]
    folders = yield from attempt_folders(store)
    tried += [one.attempt for one in folders.attempts if (one.epoch, one.step) == (holding.epoch, step)]
    for attempt in sorted(set(tried)):
        said = yield from decide(
            store, AbortRegister(AttemptId(step, holding.epoch, attempt), "another attempt at the step begins")
        )
        if isinstance(said, CommitRegister):
            raise PathOccupied(f"step {step} is committed in epoch {holding.epoch} already")
    return AttemptId(step, holding.epoch, max(tried, default=0) + 1)


def require_newest(store: Store, epoch: int) -> Operations[RunObjects]:
    """The names under `commits/`, in which no claim is newer than `epoch`; else raises Superseded with epoch, host, pid."""
    listing = yield from list_commits(store)
    if listing.newest > epoch:
        raise (yield from superseded(store, epoch, newest=listing.newest))
    return listing


def superseded(store: Store, epoch: int, *, newest: int | None = None) -> Operations[Superseded]:
    """The error of a job whose epoch was superseded, with what is known of the newest claim."""
    if newest is None:
        newest = (yield from list_commits(store)).newest
    try:
        by = (yield from read_claim(store, newest)).by
        who = f"host {by.host}, process {by.pid}"
    except CheckpointError as problem:
        who = f"its claim cannot be read: {problem}"
    return Superseded(f"{store.url}: epoch {epoch} of this job was superseded by epoch {newest} ({who})")


def claim_lost(store: Store, by: Claimer, *, epochs: Collection[int]) -> Operations[None]:
    """Each of these epochs, whose objects were lost, has a claim again, which the next claim closes. [RUN-105]"""
    yield from _make_commits(store)
    for epoch in sorted(epochs):
        yield from create_exclusively(store, claim_name(epoch), encode_claim(Claim(epoch, by)))


def start_lost(store: Store, *, continued: Mapping[int, AttemptId | None]) -> Operations[None]:
    """Each of these epochs, whose start object was lost, has one again, and the live branch goes on from these. [RUN-107]"""
    for epoch, attempt in sorted(continued.items()):
        yield from create_exclusively(store, start_name(epoch), encode_start(EpochStart(epoch, attempt)))


def _make_commits(store: Store) -> Operations[None]:
    yield NOW
    store.make_directories(COMMITS)
    if store.capabilities.directory_sync:
        yield NOW
        store.sync_directory("")


def _take_number(store: Store, by: Claimer) -> Operations[int]:
    yield from _make_commits(store)
    while True:
        epoch = (yield from list_commits(store)).newest + 1
        data = encode_claim(Claim(epoch, by))
        if (yield from create_exclusively(store, claim_name(epoch), data)) == data:  # [RUN-32]
            return epoch


def _close_older(store: Store, epoch: int) -> Operations[None]:
    """Every older claim has an adopted object, its own or a void one, for good. [RUN-33]"""
    listing = yield from list_commits(store)
    for older in sorted(listing.claims - listing.adopted):
        if older < epoch:
            yield from create_exclusively(store, adopted_name(older), encode_adopted(Void(older, epoch)))


def _what_counts(store: Store, epoch: int, token: str, adopting: Collection[AttemptId]) -> Operations[Adopted]:
    listing = yield from list_commits(store)  # [RUN-34] not before the older epochs are closed
    below = yield from newest_adopted(store, listing, before=epoch)
    highest = max((one.epoch for one in adopting), default=0)
    if below is None:
        return Adopted(epoch, token, highest, tuple(sorted(adopting)))
    # What retention removed is left out: if a late writer links it once more, it does not count.
    found = set(below.commits) & listing.registers
    for attempt in sorted(one for one in listing.registers if one.epoch == below.epoch):
        try:
            if isinstance((yield from read_register(store, attempt)), CommitRegister):
                found.add(attempt)
        except MissingFile:
            continue  # removed since it was listed
        except Damaged:
            found.add(attempt)  # somebody may repair it; what does not count now never will
    return Adopted(epoch, token, max(below.epoch, highest), tuple(sorted(found.union(adopting))))


# -- a writer --------------------------------------------------------------------------------------------------------------


def decide(store: Store, register: CommitRegister | AbortRegister) -> Operations[CommitRegister | AbortRegister]:
    """What the attempt's register says for good: `register`, or what another said before; the caller obeys it.

    The folder of a commit must be whole and durable before. Raises StorageFailed kinds: then ask again. [RUN-40, RUN-41]
    """
    found = yield from create_exclusively(store, register.id.register, encode_register(register))
    return decode_register(found, attempt=register.id)


def acknowledge(store: Store, attempt: AttemptId, *, poll_s: float, limit_s: float) -> Operations[Acknowledgement]:
    """What may be said of a commit whose register is linked and durable. Looks at once, then every `poll_s` up to `limit_s`.

    Raises StorageFailed kinds, Damaged kinds for an adopted object that is not what was written. [RUN-42, RUN-43]
    """
    outcome = Acknowledgement.UNDECIDED
    for look in range(1 + ceil(limit_s / poll_s)):
        if look:
            yield poll_s
        outcome = yield from _look(store, attempt)
        if outcome is not Acknowledgement.UNDECIDED:
            break
    if outcome is Acknowledgement.ACKNOWLEDGED:
        yield NOW
        if not store.exists(attempt.folder):  # linked once more, behind its removal: taken back [RUN-44]
            yield from remove_register(store, attempt)
            return Acknowledgement.REMOVED
    return outcome


def _look(store: Store, attempt: AttemptId) -> Operations[Acknowledgement]:
    listing = yield from list_commits(store)
    if listing.newest > attempt.epoch:
        if listing.newest not in listing.adopted:
            return Acknowledgement.UNDECIDED
        adopted = yield from read_adopted(store, listing.newest)
        if isinstance(adopted, Void):
            return Acknowledgement.UNDECIDED  # somebody newer claims
        if attempt not in adopted.commits:
            return Acknowledgement.SUPERSEDED
    return Acknowledgement.ACKNOWLEDGED if attempt in listing.registers else Acknowledgement.REMOVED
