"""What the ranks of a job ask each other: each member says a value, member 0 answers, every member is told a value.

A question is a round (`team`) with types: who asks it sees no bytes. Whatever goes wrong in what a member says, or in the
answer, is raised on all members alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Generic, TypeVar

from elastickpt.ranks.messages import decode, encode
from elastickpt.ranks.team import Team

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
