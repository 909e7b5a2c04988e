"""The team of each process group: met once, kept while the group lives, met again after a failure."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from elastickpt.comms.hosts import host_identity
from elastickpt.comms.star import Star, connect
from elastickpt.comms.team import SILENCE_S, Alone, Team
from elastickpt.training.group import Group


@dataclass(slots=True)
class _Meeting:
    """The newest meeting of a group; its number is the same on all members, since a failure ends it for all of them."""

    generation: int
    star: Star


# The connections belong to the process group, so they are found by it; a group that is gone takes them along.
_MEETINGS: weakref.WeakKeyDictionary[object, dict[str, _Meeting]] = weakref.WeakKeyDictionary()


def team_of(group: Group, *, purpose: str = "", meeting_timeout_s: float = 120.0, silence_s: float = SILENCE_S) -> Team:
    """The team of this group, connected; blocking at the first call and after a failure, when every member must call it.

    Each `purpose` has a team of its own, so that rounds of two threads never mix; one thread at a time may use a team.
    Raises DeadlineExceeded naming the ranks that did not come within `meeting_timeout_s`.
    """
    if len(group.ranks) == 1:
        return Alone(group.rank, host_identity())
    meetings = _MEETINGS.setdefault(group.handle, {})
    known = meetings.get(purpose)
    if known is not None and not known.star.closed:
        return known.star
    generation = 0 if known is None else known.generation + 1
    store = group.store(generation) if not purpose else group.own_store(f"{purpose}/{generation}")
    star = connect(store, group.member, group.ranks, timeout_s=meeting_timeout_s, silence_s=silence_s)
    meetings[purpose] = _Meeting(generation, star)
    return star
