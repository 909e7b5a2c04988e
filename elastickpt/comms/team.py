"""Rounds: each rank contributes bytes or a failure, member 0 decides, all get the same outcome.

    contribute --> every payload present --> decide() --> verdict  --> round() returns on every member
        |                                       |
        +-- a failure, a lost or silent peer ---+------> report   --> round() raises the same error on every member

Whoever dies is noticed by its closed connection, whoever hangs by its silence: working members send a beat each
`BEAT_S`, and one that sent nothing for `silence_s` counts as lost. So a round ends on every survivor within its own work
plus the slowest survivor's, plus `silence_s`.  [SAVE-54, SAVE-61..64]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from elastickpt.errors import CheckpointError, RankFailure, from_report

BEAT_S = 1.0
SILENCE_S = 30.0

Contribute = Callable[[], bytes]
Decide = Callable[[Sequence[bytes]], Sequence[bytes]]


class Team(Protocol):
    """The ranks of one process group. `member` counts within it from 0; `ranks` are the job's ranks by member."""

    @property
    def member(self) -> int: ...

    @property
    def ranks(self) -> tuple[int, ...]: ...

    @property
    def hosts(self) -> tuple[str, ...]:
        """An identifier of each member's host; equal for members that share one."""
        ...

    def round(self, name: str, contribute: Contribute, decide: Decide) -> bytes:
        """One round; blocking. `decide` runs on member 0 only, gets all payloads by member, and returns one reply each.

        Raises on every member the error that `errors.from_report` makes of all failures; the error that this process itself
        raised is its `__cause__`.
        """
        ...

    def close(self) -> None: ...


def failure_of(error: BaseException, rank: int) -> RankFailure:
    """What crosses to other ranks of an error raised here."""
    if isinstance(error, CheckpointError):
        return RankFailure(rank, error.kind, error.message)
    return RankFailure(rank, CheckpointError.kind, f"{type(error).__name__}: {error}")


class Alone:
    """The team of a job with one process: a round is a call."""

    def __init__(self, rank: int, host: str) -> None:
        self._rank = rank
        self._host = host

    @property
    def member(self) -> int:
        return 0

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self._rank,)

    @property
    def hosts(self) -> tuple[str, ...]:
        return (self._host,)

    def round(self, name: str, contribute: Contribute, decide: Decide) -> bytes:
        try:
            (reply,) = decide([contribute()])
        except CheckpointError:
            raise
        except Exception as error:
            raise from_report([failure_of(error, self._rank)]) from error
        return reply

    def close(self) -> None:
        return None
