"""Rounds and questions: each rank says something or fails, member 0 decides, all get the same outcome.

    contribute --> every payload present --> decide() --> verdict  --> round() returns on every member
        |                                       |
        +-- a failure, a lost or silent peer ---+------> report   --> round() raises the same error on every member

Rounds belong to a call of the user that all ranks make. A rank that has not made it yet is late, and waited for as a collective
waits, up to the call's limit: it may evaluate, or stand in a debugger. One that has made it must answer: working members send
a beat each `BEAT_S`, and one that sent nothing for `silence_s` counts as lost. One whose process is gone ends every wait at
once.  [SAVE-54, SAVE-61..64, SAVE-110..114]

A question is a round with types: who asks it sees no bytes. Whatever goes wrong in what a member says, or in the answer, is
raised on all members alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from types import NoneType
from typing import Generic, Protocol, TypeVar

from elastickpt.errors import CheckpointError, RankFailure, Refused, from_report
from elastickpt.ranks.messages import decode, encode

BEAT_S = 1.0
SILENCE_S = 30.0
AGAIN_S = 10.0

Contribute = Callable[[], bytes]
Decide = Callable[[Sequence[bytes]], Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class Call:
    """What all ranks are to call: `what`, as messages name it, like "save to runs/a/step-5".

    Ranks that come later than this one are waited for at most `wait_limit_s`, which the user gives as `limit_name`. A rank on
    another host whose connection was lost may come back within `again_s`. `number` counts calls that all ranks make as often,
    from 1: a rank that is behind, as others gave up a call, makes that one alone. It is 0 for calls that are not counted.
    """

    what: str
    wait_limit_s: float
    limit_name: str = "wait_limit_s"
    again_s: float = AGAIN_S
    number: int = 0


def is_limit(value: object) -> bool:
    """Whether it says for how long to wait: seconds, a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value > 0


def require_limit(name: str, value: object) -> None:
    """Raises Refused for what is no limit of a wait, nor None for the default."""
    if value is not None and not is_limit(value):
        raise Refused(f"{name}={value!r}: expected seconds, a finite number above 0, or None for the process group's timeout")


class Team(Protocol):
    """The ranks of one process group. `member` counts within it from 0; `ranks` are the job's ranks by member."""

    @property
    def member(self) -> int: ...

    @property
    def ranks(self) -> tuple[int, ...]: ...

    @property
    def hosts(self) -> tuple[str, ...]:
        """An identifier of each member's host; equal for members that share one. Known after the first round."""
        ...

    @property
    def broken(self) -> bool:
        """Whether a member's process is known to be gone, so that no round can end well any more."""
        ...

    def enter(self, call: Call) -> None:
        """The next round begins this call: in it members that are late are waited for. Not blocking."""
        ...

    def round(self, name: str, contribute: Contribute, decide: Decide) -> bytes:
        """One round; blocking. `decide` runs on member 0 only, gets all payloads by member, and returns one reply each.

        Raises on every member the error that `errors.from_report` makes of all failures; the error that this process itself
        raised is its `__cause__`. Raises Cancelled here if the team is ended meanwhile.
        """
        ...

    def leave(self, why: BaseException) -> None:
        """This member goes no further in its call, for a reason that no round has told the others: they wait no longer."""
        ...

    def end(self, why: str) -> None:
        """Ends this member's part for good, with its threads and descriptors. From any thread: a wait in a round ends at once,
        and raises Cancelled."""
        ...


def failure_of(error: BaseException, rank: int) -> RankFailure:
    """What crosses to other ranks of an error raised here."""
    if isinstance(error, CheckpointError):
        return RankFailure(rank, error.kind, _as_text(error.message))
    return RankFailure(rank, CheckpointError.kind, _as_text(f"{type(error).__name__}: {error}"))


def _as_text(message: str) -> str:
    """What a message can carry: names of files may be no valid text."""
    return message.encode(errors="backslashreplace").decode()


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

    @property
    def broken(self) -> bool:
        return False

    def round(self, name: str, contribute: Contribute, decide: Decide) -> bytes:
        try:
            (reply,) = decide([contribute()])
        except CheckpointError:
            raise
        except Exception as error:
            raise from_report([failure_of(error, self._rank)]) from error
        return reply

    def enter(self, call: Call) -> None:
        return None

    def leave(self, why: BaseException) -> None:
        return None

    def end(self, why: str) -> None:
        return None


Said = TypeVar("Said")
Told = TypeVar("Told")


@dataclass(frozen=True, slots=True)
class Question(Generic[Said, Told]):
    """`name` stands in messages of errors; `said` is the type of what each member says, `told` of what it is told."""

    name: str
    said: type[Said]
    told: type[Told]

    def ask(self, team: Team, say: Callable[[], Said], answer: Callable[[Sequence[Said]], Told]) -> Told:
        """Asks all members; blocking. `answer` runs on member 0 only, gets what all said, by member, and tells all the same.

        Raises what `Team.round` raises.
        """
        return self.ask_each(team, say, lambda said: [answer(said)] * len(said))

    def ask_each(self, team: Team, say: Callable[[], Said], answer: Callable[[Sequence[Said]], Sequence[Told]]) -> Told:
        """The same, with an answer for each member, in their order."""

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            answers = answer([decode(payload, self.said) for payload in payloads])
            encoded = {number: encode(one) for number, one in {id(one): one for one in answers}.items()}  # each object once
            return [encoded[id(one)] for one in answers]

        return decode(team.round(self.name, lambda: encode(say()), decide), self.told)


def all_do(team: Team, name: str, act: Callable[[], None]) -> None:
    """Every member acts; returns once all have. Blocking. Raises, on all members alike, what went wrong on any."""
    Question(name, NoneType, NoneType).ask(team, act, lambda _: None)


def first_does(team: Team, name: str, act: Callable[[], None]) -> None:
    """Member 0 acts, once all members have come; returns when it has. Blocking. Raises on all members what it raised."""
    Question(name, NoneType, NoneType).ask(team, lambda: None, lambda _: act())
