"""What a writer is told of how its attempt is to end, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.records import Metrics


@dataclass(frozen=True, slots=True)
class Order:
    """How an attempt ends that is committed by its writers.

    `register` is the attempt in its run; None where the name of the path decides. Member 0 alone has an `outline`
    (`contents.encode_outline`: the same object for each save of a structure) and the `rest` (`contents.encode_rest`); they are
    b"" on all others. `metrics` are those known at the commit; for a run, the same on all members.
    """

    register: AttemptId | None
    outline: bytes = b""
    rest: bytes = b""
    metrics: Metrics = ()


@dataclass(frozen=True, slots=True)
class Committed:
    """The attempt is a checkpoint, and for a run acknowledged. `nbytes` of all arrays; `manifest` is the digest of its file."""

    nbytes: int
    arrays: int
    manifest: str
