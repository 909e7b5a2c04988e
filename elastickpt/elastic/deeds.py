"""What a coordinator's decisions ask to be done, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elastickpt.elastic.job import Choose
from elastickpt.elastic.messages import Commit, Terms, ToMember


@dataclass(frozen=True, slots=True)
class Send:
    uid: str
    message: ToMember


@dataclass(frozen=True, slots=True)
class KillWorker:
    """Its process, or its connection where no launcher holds it."""

    uid: str


@dataclass(frozen=True, slots=True)
class Record:
    event: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class AskLadder:
    order: Choose
    last: Commit | None
    terms: Terms


@dataclass(frozen=True, slots=True)
class Replace:
    """Start this many more workers."""

    count: int


Deed = Send | KillWorker | Record | AskLadder | Replace
