"""The teams of each process group, which live as long as it does."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from elastickpt.ranks.hosts import host_identity
from elastickpt.ranks.hub import Hub
from elastickpt.ranks.process_group import Group, JobStore
from elastickpt.ranks.processes import Acquaintances
from elastickpt.ranks.spoke import Spoke
from elastickpt.ranks.star import Star
from elastickpt.ranks.team import SILENCE_S, Alone, Team


@dataclass(slots=True)
class _Teams:
    """Those of one process group, by purpose. It does not hold the group."""

    stars: dict[str, Star] = field(default_factory=dict)

    def end(self, why: str) -> None:
        while self.stars:
            self.stars.popitem()[1].end(why)


# Connections belong to the process group, so they are found by it; a group that is gone takes them along. What is known of a
# job's processes is known to all of its groups.
_TEAMS: weakref.WeakKeyDictionary[object, _Teams] = weakref.WeakKeyDictionary()
_KNOWN: weakref.WeakKeyDictionary[object, Acquaintances] = weakref.WeakKeyDictionary()
_CHANGING = threading.RLock()  # a group may be found gone while it is held


def team_of(group: Group, *, purpose: str = "", silence_s: float = SILENCE_S) -> Team:
    """The team of this group for that purpose. Not blocking: its members meet as they make their calls (`Team.enter`).

    A purpose is the same on all members; two that may be used at one time are different, so that rounds never mix.
    """
    if len(group.ranks) == 1:
        return Alone(group.rank, host_identity())
    with _CHANGING:
        teams = _TEAMS.get(group.handle)
        if teams is None:
            teams = _TEAMS[group.handle] = _Teams()
            weakref.finalize(group.handle, teams.end, "its process group is gone").atexit = False
        star = teams.stars.get(purpose)
        if star is None:
            known = _KNOWN.setdefault(group.job, Acquaintances())
            end = Hub if group.member == 0 else Spoke
            star = teams.stars[purpose] = end(_store(group, purpose), group.member, group.ranks, known, silence_s=silence_s)
        return star


def _store(group: Group, purpose: str) -> Callable[[], JobStore]:
    """Opens the job's store for a team, which must not hold its group: it would never go."""
    rank, ranks, handle = group.rank, group.ranks, weakref.ref(cast(object, group.handle))

    def opened() -> JobStore:
        live = Group(rank, ranks, handle())  # type: ignore[arg-type]  # of a group that is gone there is no store
        return live.own_store(purpose) if purpose else live.store("calls")

    return opened


def _teams(group: Group) -> _Teams | None:
    return None if group.handle is None else _TEAMS.get(group.handle)


def end_team(group: Group, purpose: str, why: str) -> None:
    """Ends this member's part in one team, if there is one; a later `team_of` begins anew. From any thread."""
    with _CHANGING:
        teams = _teams(group)
        star = None if teams is None else teams.stars.pop(purpose, None)
    if star is not None:
        star.end(why)


def end_teams(group: Group, why: str) -> None:
    """Ends this member's part in all teams of a group, with their threads and descriptors. From any thread: each wait for other
    ranks ends at once, and raises Cancelled."""
    with _CHANGING:
        teams = _teams(group)
    if teams is not None:
        teams.end(why)
