"""One attempt to write one checkpoint, as everybody who works on it knows it, and what becomes of it.

An `Attempt` is made when its draft is opened, and passed on whole: to the other ranks, to the writers, with every vote, to
every committer. Nothing else says where it stands or how it is to be committed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from elastickpt.commit.draft import Draft
from elastickpt.errors import RankFailure
from elastickpt.format.records import FileDigest
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.records import Metrics
from elastickpt.ranks.messages import Message, decode, encode
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
