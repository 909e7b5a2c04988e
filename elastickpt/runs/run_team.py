"""The team in which the ranks of a run agree: what it is called, and how long it waits for those that come late."""

from __future__ import annotations

import weakref
from itertools import count

from elastickpt.format.digest import file_digest
from elastickpt.ranks.process_group import Group, team_of
from elastickpt.ranks.team import Call, Team, all_do
from elastickpt.storage.store import Store

# By process group and root, never by process: runs of one group at one root have teams of their own, one after the other or at
# one time, so a name must not come twice; all ranks of the group open them in one order, and so count alike.
_COUNTS: weakref.WeakKeyDictionary[object, dict[str, count[int]]] = weakref.WeakKeyDictionary()


def new_purpose(group: Group, store: Store) -> str:
    """What tells the teams of one more run from those of others in its process group."""
    counts = {} if group.handle is None else _COUNTS.setdefault(group.handle, {})
    return f"run-{file_digest(store.url.encode())[:16]}-{next(counts.setdefault(store.url, count()))}"


def call_of(group: Group, what: str, wait_limit_s: float | None) -> Call:
    """A call of a run's ranks."""
    return Call(what, *group.limit(wait_limit_s))


def met(group: Group, purpose: str, call: Call) -> Team:
    """The team of that purpose, whose members know each other. Blocking; all ranks call it."""
    team = team_of(group, purpose=purpose)
    team.enter(call)
    all_do(team, "meet", lambda: None)
    return team
