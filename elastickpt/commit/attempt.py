"""One attempt to write one checkpoint, as everybody who works on it knows it, and what becomes of it.

An `Attempt` is made when its draft is opened, and passed on whole: to the other ranks, to the writers, with every vote, to
every committer. Nothing else says where it stands or how it is to be committed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import msgpack

from elastickpt.commit.draft import Draft
from elastickpt.errors import Malformed, RankFailure
from elastickpt.format.records import FileDigest
from elastickpt.ledger.names import AttemptId, parse_id
from elastickpt.ledger.records import Metrics
from elastickpt.storage.store import Durability, Store

AttemptFields = tuple[str, tuple[str, str, str], str, str, Metrics, "int | None", float]


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

    def fields(self) -> AttemptFields:
        """As other processes are told of it."""
        draft = (self.draft.name, self.draft.folder, self.draft.attempt)
        register = "" if self.register is None else str(self.register)
        return self.store, draft, self.durability, register, self.metrics, self.step, self.time

    @classmethod
    def of(cls, fields: AttemptFields) -> Attempt:
        """What `fields` gave. Raises Malformed for what it never gives."""
        store, draft, durability, register, metrics, step, time = fields
        attempt = parse_id(register) if register else None
        if (register and attempt is None) or durability not in get_args(Durability):
            raise Malformed(f"an attempt with register {register!r} and durability {durability!r}")
        return cls(store, Draft(*draft), durability, attempt, metrics, step, time)  # type: ignore[arg-type]  # looked at above


@dataclass(frozen=True, slots=True)
class Committed:
    """The attempt is a checkpoint, and for a run acknowledged. `nbytes` of all arrays; `manifest` is the digest of its file."""

    nbytes: int
    arrays: int
    manifest: str

    def encode(self) -> bytes:
        return bytes(msgpack.packb((self.nbytes, self.arrays, self.manifest)))

    @classmethod
    def decode(cls, data: bytes) -> Committed:
        return cls(*msgpack.unpackb(data))


Said = FileDigest | RankFailure | None  # by a writer: its attestation, or why there is none; None: it is at work
Verdict = Committed | tuple[RankFailure, ...]


def encode_vote(attempt: Attempt, said: Said) -> bytes:
    match said:
        case None:
            words: tuple[object, ...] = ()
        case FileDigest(path, nbytes, digest):
            words = (path, nbytes, digest)
        case RankFailure(rank, kind, message):
            words = (rank, kind, message)
    return bytes(msgpack.packb((attempt.fields(), words)))


def decode_vote(data: bytes) -> tuple[Attempt, Said]:
    """What `encode_vote` encoded. Raises Malformed for what it never makes."""
    fields, said = msgpack.unpackb(data, use_list=False)
    attempt = Attempt.of(fields)
    if not said:
        return attempt, None
    return attempt, FileDigest(*said) if isinstance(said[0], str) else RankFailure(*said)


def encode_verdict(attempt: str, verdict: Verdict) -> bytes:
    """Of the attempt with this id."""
    if isinstance(verdict, Committed):
        return bytes(msgpack.packb((attempt, (verdict.nbytes, verdict.arrays, verdict.manifest), ())))
    return bytes(msgpack.packb((attempt, (), [(f.rank, f.kind, f.message) for f in verdict])))


def decode_verdict(data: bytes) -> tuple[str, Verdict]:
    """What `encode_verdict` encoded."""
    attempt, committed, report = msgpack.unpackb(data, use_list=False)
    return attempt, Committed(*committed) if committed else tuple(RankFailure(*failure) for failure in report)
