"""Where saves go, and one attempt to write one checkpoint there, as everybody who works on it knows it, and what becomes of it.

destination.locate()  on every rank, before anything is asked of the others      -> Located
located.open(...)     on member 0: the attempt exists, and writers may write      -> Attempt

An `Attempt` is made when its draft is opened, and passed on whole: to the other ranks, to the writers, with every vote, to
every committer. Nothing else says where it stands or how it is to be committed.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol

from elastickpt.commit.draft import Draft, begin, new_draft, require_free, sweep
from elastickpt.errors import RankFailure, Refused
from elastickpt.format.arrays import Section
from elastickpt.format.records import FileDigest
from elastickpt.ledger.epochs import Holding, open_attempt
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import Metrics
from elastickpt.ranks.messages import Message, decode, encode
from elastickpt.storage.opening import local_path, locate_for_saving
from elastickpt.storage.store import Durability, Store


@dataclass(frozen=True, slots=True)
class Attempt:
    """All that one needs to write, commit or abort it, but for its contents.

    `store` is the URL of the store in whose root the draft stands. `register` is the attempt in its run; None where the name of
    the path decides. `metrics` are those known when it was opened. `step` and `time`, in seconds since 1970, are the
    manifest's: whoever commits it writes the same.
    """

    store: str
    draft: Draft
    durability: Durability
    register: AttemptId | None = None
    metrics: Metrics = ()
    step: int | None = None
    time: float = 0.0

    @property
    def id(self) -> str:
        return self.draft.attempt

    @property
    def where(self) -> str:
        """The checkpoint that comes of it, for messages."""
        return f"{self.store}/{self.draft.name}"

    def path(self, relative: str) -> str:
        """Where a file of the checkpoint stands while it is a draft, relative to the store's root."""
        return self.draft.path(relative)

    def in_store(self, store: Store) -> tuple[Attempt, tuple[str, ...]]:
        """The attempt with a durability that this store can give, and a note where that is less than was asked for: no
        failure."""
        able = store.capabilities
        if self.durability == "process" or able.directory_sync:
            return self, ()
        return replace(self, durability="process"), (
            f"durability 'process' instead of 'power': {able.name} lacks directory_sync",
        )


@dataclass(frozen=True, slots=True)
class Committed:
    """The attempt is a checkpoint, and for a run acknowledged. `nbytes` of all arrays; `manifest` is the digest of its file."""

    nbytes: int
    arrays: int
    manifest: str


WriterSaid = FileDigest | RankFailure | None  # by a writer: its attestation, or why there is none; None: it is at work
Verdict = Committed | tuple[RankFailure, ...]


class _Vote(Message, frozen=True):
    """What one writer says of an attempt; neither of the two: it is at work."""

    attempt: Attempt
    attested: FileDigest | None
    failed: RankFailure | None


class Decision(Message, frozen=True):
    """What became of the attempt with this id: a commit, or why there is none."""

    attempt: str
    committed: Committed | None
    report: tuple[RankFailure, ...]

    @classmethod
    def of(cls, attempt: str, verdict: Verdict) -> Decision:
        return cls(attempt, verdict, ()) if isinstance(verdict, Committed) else cls(attempt, None, verdict)

    @property
    def verdict(self) -> Verdict:
        return self.committed or self.report


def encode_vote(attempt: Attempt, said: WriterSaid) -> bytes:
    failed = said if isinstance(said, RankFailure) else None
    return encode(_Vote(attempt, said if isinstance(said, FileDigest) else None, failed))


def decode_vote(data: bytes) -> tuple[Attempt, WriterSaid]:
    """What `encode_vote` encoded. Raises InternalError for what it never makes."""
    vote = decode(data, _Vote)
    return vote.attempt, vote.attested or vote.failed


def encode_verdict(attempt: str, verdict: Verdict) -> bytes:
    """Of the attempt with this id."""
    return encode(Decision.of(attempt, verdict))


def decode_verdict(data: bytes) -> tuple[str, Verdict]:
    """What `encode_verdict` encoded. Raises InternalError for what it never makes."""
    decision = decode(data, Decision)
    return decision.attempt, decision.verdict


_TAKEN: set[str] = set()
_CHANGING = threading.Lock()


def take_path(path: str) -> None:
    """A save to this path is under way in this process until `leave_path`. Raises Refused if one is."""
    with _CHANGING:
        _require_idle(path)
        _TAKEN.add(path)


def leave_path(path: str) -> None:
    """The path is free again."""
    with _CHANGING:
        _TAKEN.discard(path)


def require_idle(path: str) -> None:
    """Raises Refused while a save to the path is under way."""
    with _CHANGING:
        _require_idle(path)


def _require_idle(path: str) -> None:
    if path in _TAKEN:
        raise Refused(f"{path}: a save to it is still under way in this process; wait for its result, or choose another path")


class Located(Protocol):
    """A destination whose store is open."""

    @property
    def store(self) -> Store: ...

    @property
    def name(self) -> str:
        """What all ranks must say alike."""
        ...

    def require_free(self) -> None:
        """Raises on member 0 if nothing can be committed there."""
        ...

    def open(self, sections: Collection[Section], durability: Durability) -> tuple[Attempt, tuple[str, ...]]:
        """Member 0 only, which holds arrays of these sections; what was found on the way, too. Raises StorageFailed kinds,
        Superseded."""
        ...


class Destination(Protocol):
    """Where one save goes. Made on every rank, from the same arguments."""

    @property
    def path(self) -> str:
        """As people write it; of two saves to one path the second is refused while the first is under way."""
        ...

    @property
    def step(self) -> int | None: ...

    @property
    def metrics(self) -> Metrics: ...

    def require_accepted(self) -> None:
        """Raises Refused if this rank's part of the save cannot be accepted: all ranks hear why, and the path is not taken."""
        ...

    def locate(self) -> Located:
        """Opens the store; blocking, not on the thread that trains. Raises what opening raises."""
        ...


@dataclass(frozen=True, slots=True)
class PathDestination:
    """A path: the draft stands beside it, and its rename is the commit. A local path is absolute."""

    path: str
    step: int | None
    metrics: Metrics = ()

    @classmethod
    def of(cls, path: str | os.PathLike[str], step: int | None) -> PathDestination:
        """Relative paths are below the working directory of now."""
        text = os.fspath(path)
        return cls(text if "://" in text or not text else os.path.abspath(local_path(text)), step)

    def require_accepted(self) -> None:
        """Every path may be tried."""

    def locate(self) -> Located:
        return _Path(*locate_for_saving(self.path), self.step)


@dataclass(frozen=True, slots=True)
class _Path:
    store: Store
    name: str
    step: int | None

    def require_free(self) -> None:
        require_free(self.store, self.name)

    def open(self, sections: Collection[Section], durability: Durability) -> tuple[Attempt, tuple[str, ...]]:
        swept = sweep(self.store, self.name)
        notes = [f"swept {folder}, which nobody writes any more" for folder in swept.removed]
        notes += [f"left {folder}: {why}" for folder, why in swept.left]
        draft = new_draft(self.name, pid=os.getpid())
        begin(self.store, draft, sections=sections)
        return Attempt(self.store.url, draft, durability, step=self.step, time=time.time()), tuple(notes)


@dataclass(frozen=True, slots=True)
class RunDestination:
    """A step of a run, whose root the store is: its register is the commit. `holding` is member 0's claim, None on others;
    `epoch` that of the job, on all of them; `refused` why this rank's part of the save cannot be accepted, which all ranks are
    to hear; `step` is None where that is why."""

    store: Store
    holding: Holding | None
    step: int | None
    epoch: int
    metrics: Metrics = ()
    refused: Refused | None = None

    @property
    def path(self) -> str:
        step = "a step that is no number" if self.step is None else f"step {self.step}"
        return f"{self.store.url}, {step} of epoch {self.epoch}"

    def require_accepted(self) -> None:
        if self.refused is not None:
            raise self.refused

    def locate(self) -> Located:
        if self.step is None:
            raise Refused(f"{self.path}: expected the number of completed steps")
        return _Step(self.store, self.holding, self.step, self.metrics)


@dataclass(frozen=True, slots=True)
class _Step:
    store: Store
    holding: Holding | None
    step: int
    metrics: Metrics

    @property
    def name(self) -> str:
        return f"step {self.step}"

    def require_free(self) -> None:
        """Opening the attempt finds out."""

    def open(self, sections: Collection[Section], durability: Durability) -> tuple[Attempt, tuple[str, ...]]:
        if self.holding is None:
            raise Refused(f"{self.store.url}: expected the run's claim on member 0, found none")
        register = complete(open_attempt(self.store, self.holding, step=self.step))
        draft = Draft(register.folder, register.folder, secrets.token_hex(8))
        begin(self.store, draft, sections=sections)
        return Attempt(self.store.url, draft, durability, register, self.metrics, self.step, time.time()), ()
