"""The job's process group as this library needs it: who is in it, and the store that everybody reaches."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from elastickpt.errors import DeadlineExceeded, Refused


class JobStore:
    """The process group's own store behind two operations; keys are below a prefix of ours."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = PrefixStore(prefix, store)

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)  # type: ignore[arg-type]  # the stub says str; the store takes bytes

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Blocks until the key is set. Raises DeadlineExceeded naming it."""
        try:
            self._store.wait([key], timedelta(seconds=timeout_s))
            return bytes(self._store.get(key))
        except RuntimeError as error:
            raise DeadlineExceeded(f"the job's store has no key {key!r} after {timeout_s:g} s: {error}") from error


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

    def store(self, generation: int) -> JobStore:
        """The store for one meeting of the members; each meeting has keys of its own."""
        store, name = self._job_store()
        return JobStore(store, f"elastickpt/{name}/{generation}")

    def own_store(self, meeting: str) -> JobStore:
        """The same over a connection of its own: a thread that waits in it keeps nobody else from the job's store."""
        store, name = self._job_store()
        own: Store = store.clone()  # type: ignore[attr-defined]  # the stub lacks it
        return JobStore(own, f"elastickpt/{name}/{meeting}")

    def _job_store(self) -> tuple[Store, str]:
        if self.handle is None:
            raise Refused("a process without a process group has no store")
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


def torch_version() -> str:
    """The torch that runs here, local build tag included."""
    return str(torch.__version__)
