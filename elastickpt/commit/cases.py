"""An attempt as its writers speak of it among each other, what each one says, and what is decided; as values and as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import msgpack

from elastickpt.commit.draft import Draft
from elastickpt.commit.orders import Committed
from elastickpt.errors import Malformed, RankFailure
from elastickpt.format.records import FileDigest
from elastickpt.ledger.names import AttemptId, parse_id
from elastickpt.ledger.records import Metrics
from elastickpt.storage.store import Durability


@dataclass(frozen=True, slots=True)
class Case:
    """All that a writer needs to know to commit or abort the attempt, but for its contents."""

    store: str
    draft: Draft
    durability: Durability
    register: AttemptId | None
    metrics: Metrics

    @property
    def key(self) -> str:
        return self.draft.attempt

    @property
    def where(self) -> str:
        return f"{self.store}/{self.draft.name}"


Said = FileDigest | RankFailure | None  # its attestation, or why there is none; None: it is at work
Verdict = Committed | tuple[RankFailure, ...]


def encode_vote(case: Case, said: Said) -> bytes:
    draft = (case.draft.name, case.draft.folder, case.draft.attempt)
    about = (case.store, draft, case.durability, "" if case.register is None else str(case.register), case.metrics)
    match said:
        case None:
            return bytes(msgpack.packb((about, ())))
        case FileDigest(path, nbytes, digest):
            return bytes(msgpack.packb((about, (path, nbytes, digest))))
        case RankFailure(rank, kind, message):
            return bytes(msgpack.packb((about, (rank, kind, message))))


def decode_vote(data: bytes) -> tuple[Case, Said]:
    """What `encode_vote` encoded. Raises Malformed for what it never makes."""
    (store, draft, durability, register, metrics), said = msgpack.unpackb(data, use_list=False)
    attempt = parse_id(register) if register else None
    if (register and attempt is None) or durability not in get_args(Durability):
        raise Malformed(f"a writer spoke of register {register!r} and durability {durability!r}")
    case = Case(store, Draft(*draft), durability, attempt, metrics)
    if not said:
        return case, None
    return case, FileDigest(*said) if isinstance(said[0], str) else RankFailure(*said)


def encode_verdict(key: str, verdict: Verdict) -> bytes:
    if isinstance(verdict, Committed):
        return bytes(msgpack.packb((key, (verdict.nbytes, verdict.arrays, verdict.manifest), ())))
    return bytes(msgpack.packb((key, (), [(f.rank, f.kind, f.message) for f in verdict])))


def decode_verdict(data: bytes) -> tuple[str, Verdict]:
    """What `encode_verdict` encoded."""
    key, committed, report = msgpack.unpackb(data, use_list=False)
    return key, Committed(*committed) if committed else tuple(RankFailure(*failure) for failure in report)
