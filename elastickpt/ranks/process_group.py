"""The job's process groups as this library needs them: who is in one, the store that everybody reaches, and the teams of each,
which live as long as it does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from elastickpt.errors import DeadlineExceeded, Refused, fault
from elastickpt.ranks.hub import Hub
from elastickpt.ranks.processes import Acquaintances, host_identity
from elastickpt.ranks.spoke import Spoke
from elastickpt.ranks.star import Star
from elastickpt.ranks.team import SILENCE_S, Alone, Team, is_limit

NO_STORE = "the process that keeps it is gone, often that of rank 0, or cannot be reached"


class JobStore:
    """The process group's own store behind two operations; keys are below a prefix of ours."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = PrefixStore(prefix, store)

    def set(self, key: str, value: bytes) -> None:
        try:
            self._store.set(key, value)  # type: ignore[arg-type]  # the stub says str; the store takes bytes
        except RuntimeError as error:
            raise DeadlineExceeded(f"the job's store does not answer: {NO_STORE}") from error

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """What a rank has set, for which this waits at most so long. Raises DeadlineExceeded."""
        try:
            self._store.wait([key], timedelta(seconds=timeout_s))
            return bytes(self._store.get(key))
        except RuntimeError as error:
            raise DeadlineExceeded(f"the job's store did not answer within {timeout_s:g} s: {NO_STORE}") from error

    def has(self, key: str) -> bool:
        """Whether the key is set by now; one question to the store, not blocking beyond its answer. Raises DeadlineExceeded
        where there is none."""
        try:
            return bool(self._store.check([key]))
        except RuntimeError as error:
            raise DeadlineExceeded(f"the job's store does not answer: {NO_STORE}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """A process group: this process's rank in the job, the ranks of the group's members, and how to find the others.

    `handle` is the process group itself (None without one): what a cache of connections may be tied to.
    """

    rank: int
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None

    @property
    def world_size(self) -> int:
        """Number of processes in the whole job."""
        return dist.get_world_size() if self.handle is not None else 1

    @property
    def member(self) -> int:
        return self.ranks.index(self.rank)

    @property
    def timeout_s(self) -> float:
        """For how long a collective of this group waits for the others."""
        found = [] if self.handle is None else [_timeout(self.handle, device) for device in self.handle._device_types]
        known = [limit.total_seconds() for limit in found if limit is not None]
        return max(known, default=distributed_c10d.default_pg_timeout.total_seconds())

    def limit(self, wait_limit_s: float | None) -> tuple[float, str]:
        """For how long others are waited for, and what a user changes to have it otherwise.

        What is no limit counts as none: the call's first round refuses it, on all ranks alike.
        """
        if wait_limit_s is not None and is_limit(wait_limit_s):
            return wait_limit_s, "wait_limit_s"
        return self.timeout_s, "the process group's timeout, as no wait_limit_s was given"

    @property
    def job(self) -> object:
        """What the groups of one job have in common: the process group of all of it."""
        return self if self.handle is None else distributed_c10d._get_default_group()

    def store(self, purpose: str) -> JobStore:
        """The job's store, for one purpose of this group."""
        store, name = self._job_store()
        return JobStore(store, f"elastickpt/{name}/{purpose}")

    def own_store(self, purpose: str) -> JobStore:
        """The same over a connection of its own: a thread that asks it keeps nobody else from the job's store."""
        store, name = self._job_store()
        own: Store = store.clone()  # type: ignore[attr-defined]  # the stub lacks it
        return JobStore(own, f"elastickpt/{name}/{purpose}")

    def _job_store(self) -> tuple[Store, str]:
        if self.handle is None:
            raise fault("the job's store was asked for in a process without a process group")
        name = distributed_c10d._get_process_group_name(self.handle)
        return distributed_c10d._get_process_group_store(self.handle), name


def job_group(process_group: dist.ProcessGroup | None) -> Group:
    """The group a save or load is for: the one given, else the default one, else this process alone.

    Raises Refused if this process is not a member.
    """
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return Group(0, (0,), None)
        process_group = distributed_c10d._get_default_group()
    rank = dist.get_rank()
    ranks = tuple(dist.get_process_group_ranks(process_group))
    if rank not in ranks:
        raise Refused(f"rank {rank} is not in the process group given, whose ranks are {list(ranks)}")
    return Group(rank, ranks, process_group)


def _timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    try:
        limit: timedelta = group._get_backend(device).options._timeout
    except (RuntimeError, AttributeError):  # a backend that is not there, or that does not say
        return None
    return limit


def torch_version() -> str:
    """The torch that runs here, local build tag included."""
    return str(torch.__version__)


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
