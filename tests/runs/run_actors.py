"""Writers and jobs of a run as the protocol's own steps, and runs to begin with."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from elastickpt.errors import MissingFile, StorageFailed, Superseded
from elastickpt.ledger.branch import entries_of
from elastickpt.ledger.epochs import Acknowledgement, Holding, acknowledge, claim, decide, open_attempt, start
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import NOW, Operations, complete
from elastickpt.ledger.records import AbortRegister, Claimer, CommitRegister
from elastickpt.ledger.removal import remove_commits, sweep
from elastickpt.ledger.retention import Keep, judge, removable
from elastickpt.ledger.stored import read_view
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import Store
from elastickpt.testing.faults import RecordingStore

MANIFEST = "checkpoint.json"
W, X = AttemptId(10, 1, 1), AttemptId(20, 1, 1)


def memory_store() -> MemoryStore:
    return MemoryStore(f"test-{uuid.uuid4().hex}")


class Without(RecordingStore):
    """A store that says that it cannot do some things."""

    def __init__(self, inner: Store, **lacking: bool) -> None:
        super().__init__(inner)
        self._able = replace(inner.capabilities, **lacking)

    @property
    def capabilities(self):  # type: ignore[no-untyped-def]
        return self._able


def by(job: int) -> Claimer:
    return Claimer(f"host:{job}", f"token-{job}", f"host{job}", 100 + job, 7, 1000.5)


def commit_of(attempt: AttemptId, **changes: object) -> CommitRegister:
    about: dict[str, object] = {"digest": "0123456789abcdef" * 2, "nbytes": 8, "time": 1000.5, **changes}
    return CommitRegister(attempt, **about)  # type: ignore[arg-type]


def write_folder(store: Store, attempt: AttemptId) -> Operations[None]:
    """The whole checkpoint, as far as runs care."""
    yield NOW
    store.make_directories(attempt.folder)
    yield NOW
    store.create(f"{attempt.folder}/{MANIFEST}", b"whole")


def committed(store: Store, holding: Holding, *, step: int, **about: object) -> AttemptId:
    """A commit of a job, acknowledged."""
    attempt = complete(open_attempt(store, holding, step=step))
    complete(write_folder(store, attempt))
    register = commit_of(attempt, **about)
    assert complete(decide(store, register)) == register
    assert complete(acknowledge(store, attempt, poll_s=1, limit_s=1)) is Acknowledgement.ACKNOWLEDGED
    return attempt


def begun(store: Store, *, job: int, continued: AttemptId | None = None) -> Holding:
    """A job that claimed and started."""
    holding = complete(claim(store, by(job)))
    complete(start(store, holding, continued=continued))
    return holding


def run_with_one_commit(store: Store) -> None:
    """Epoch 1 with the acknowledged commit W, and the folder of X, whole and without a register."""
    committed(store, begun(store, job=1), step=W.step)
    complete(write_folder(store, X))


class Notes:
    """What an actor says it has done; `removing` before it does it."""

    def __init__(self) -> None:
        self.acknowledged: set[AttemptId] = set()
        self.chosen: set[AttemptId] = set()
        self.removing: set[AttemptId] = set()
        self.inert: set[AttemptId] = set()
        self.superseded = False

    @property
    def key(self) -> object:
        sets = (self.acknowledged, self.chosen, self.removing, self.inert)
        return (*(frozenset(one) for one in sets), self.superseded)


def old_writer(store: Store, notes: Notes, *, attempt: AttemptId = X) -> Operations[None]:
    """Links its commit, looks, and waits for a claim that it sees. A new job may sweep its folder, or what it is linking."""
    try:
        said = yield from decide(store, commit_of(attempt))
    except StorageFailed:
        return
    if isinstance(said, CommitRegister):
        yield from _acknowledge(store, notes, attempt)


def aborting_writer(store: Store, notes: Notes) -> Operations[None]:
    """Gives up what another one may be committing, and obeys the register."""
    try:
        said = yield from decide(store, AbortRegister(X, "tired"))
    except StorageFailed:
        return
    if isinstance(said, CommitRegister):
        yield from _acknowledge(store, notes, X)


def _acknowledge(store: Store, notes: Notes, attempt: AttemptId) -> Operations[None]:
    outcome = yield from acknowledge(store, attempt, poll_s=1, limit_s=1)
    if outcome is Acknowledgement.ACKNOWLEDGED:
        notes.acknowledged.add(attempt)
    if outcome is Acknowledgement.SUPERSEDED:
        notes.inert.add(attempt)


def starting_job(store: Store, notes: Notes, *, job: int) -> Operations[None]:
    """Claims, and continues from the newest commit."""
    with suppress(Superseded):
        yield from _started(store, notes, job)


def new_job(store: Store, notes: Notes, *, job: int, saves: tuple[int, ...] = ()) -> Operations[None]:
    """Starts, sweeps, removes all but the newest commit; saves, and removes again after each commit that it may acknowledge."""
    try:
        holding = yield from _started(store, notes, job)
        yield from sweep(store, holding)
        yield from _retain(store, notes, holding)
        for step in saves:
            attempt = yield from open_attempt(store, holding, step=step)
            try:
                yield from write_folder(store, attempt)
                said = yield from decide(store, commit_of(attempt))
            except (MissingFile, StorageFailed):
                return  # a newer job swept what it was writing
            if isinstance(said, CommitRegister):
                yield from _acknowledge(store, notes, attempt)
            if attempt in notes.acknowledged:
                yield from _retain(store, notes, holding)
    except Superseded:
        notes.superseded = True


def remover(store: Store, notes: Notes, *, holding: Holding) -> Operations[None]:
    """A job that goes on: removes all but its newest commit."""
    with suppress(Superseded):
        yield from _retain(store, notes, holding)


def _started(store: Store, notes: Notes, job: int) -> Operations[Holding]:
    holding = yield from claim(store, by(job))
    entries = entries_of((yield from read_view(store)))
    newest = next((one.id for one in entries if one.state == "live" and one.commit is not None), None)
    notes.chosen |= {newest} if newest else set()
    yield from start(store, holding, continued=newest)
    return holding


def _retain(store: Store, notes: Notes, holding: Holding) -> Operations[None]:
    entries = entries_of((yield from read_view(store)))
    going = removable(judge(Keep(last=1), entries, now=2000.0, verified={}))
    notes.removing |= set(going)
    yield from remove_commits(store, holding, commits=going)


def tree(store: Store, path: str = "") -> Mapping[str, bytes | None]:
    """All that stands in the store but for links; None for a directory."""
    found: dict[str, bytes | None] = {}
    for entry in store.entries(path):
        name = f"{path}/{entry.name}" if path else entry.name
        if entry.kind == "directory":
            found[name] = None
            found |= tree(store, name)
        elif entry.kind == "file":
            found[name] = store.read(name, 1 << 20)
    return found
