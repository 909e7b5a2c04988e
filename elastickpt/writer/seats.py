"""Where the writers of one job meet to commit: which member this one is, and where the candidates for committer listen."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from elastickpt.ranks.messages import Message

CANDIDATES = 3  # members 0, 1, ... that may commit an attempt, in this order


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. A candidate that cannot be reached for `succession_s`, or that is connected and says nothing for `silence_s`, is
    passed over for the next one; a member that no committer has heard of for `missing_s` is lost. A commit waits at most
    `adopt_s` for a newer claim of the run to adopt it."""

    succession_s: float = 10.0
    silence_s: float = 30.0
    missing_s: float = 60.0
    adopt_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Seat:
    """One writer's place. `ranks` are the job's, by member; `candidates` the addresses of members 0, 1, ...; `secret` is shared
    by the members, so that nobody else can speak to them."""

    member: int
    ranks: tuple[int, ...]
    candidates: tuple[str, ...]
    secret: bytes
    limits: Limits = Limits()


class Introduction(Message, frozen=True):
    """What a member says first on a connection to a candidate."""

    secret: bytes
    member: int


ALONE = Seat(0, (0,), (), b"")


def new_secret() -> bytes:
    return secrets.token_bytes(16)
