"""`async_save`: stage now, write and commit beside training; and the savers of this process that do it.

There is one for each process group and options, ended with the process, or with their group.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, SupportsIndex

from elastickpt.commit.attempt import PathDestination
from elastickpt.ranks.process_group import Group, job_group
from elastickpt.ranks.threads import apart
from elastickpt.saving.request import DEFAULT, AsyncOptions, PlacementChoice, Replicas, Request, step_of
from elastickpt.saving.saver import Saver
from elastickpt.saving.task import SaveHandle
from elastickpt.storage.store import Durability

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class _Group:
    """The savers of one process group, in the order in which all of its ranks made them. It does not hold the group.

    The name of a saver's team counts the savers of the group, never those of the process, whose other groups are other ranks'
    business. A name from the options alone would not do: a saver that is made again after `close_all` would meet what its
    predecessor left in the job's store, and ranks whose options differ by mistake would wait for each other in two teams.
    """

    def __init__(self) -> None:
        self.savers: dict[AsyncOptions, Saver] = {}
        self._numbers = count()

    def make(self, group: Group, options: AsyncOptions) -> Saver:
        return Saver(group, options, purpose=f"beside-{next(self._numbers)}")


_GROUPS: weakref.WeakKeyDictionary[object, _Group] = weakref.WeakKeyDictionary()
_ALONE = _Group()  # of a process without a group
_CHANGING = threading.Lock()


def saver_of(group: Group, options: AsyncOptions) -> Saver:
    """The saver of this group with these options. All ranks of the group ask in the same order."""
    with _CHANGING:
        found = _ALONE if group.handle is None else _GROUPS.get(group.handle)
        if found is None:
            found = _GROUPS[group.handle] = _Group()
            last = weakref.finalize(group.handle, _close_beside, found)
            last.atexit = False
        if options not in found.savers:
            found.savers[options] = found.make(group, options)
        return found.savers[options]


def close_all() -> None:
    """What an end of the process does: waits for saves under way as long as options say, leaves the rest to the writers."""
    with _CHANGING:
        groups = [_ALONE, *_GROUPS.values()]
        savers = [saver for group in groups for saver in group.savers.values()]
        for group in groups:
            group.savers.clear()
    _close(savers)


def _close(savers: Iterable[Saver]) -> None:
    until: dict[float, float] = {}
    for saver in savers:
        limit = saver.exit_limit_s
        ends = until.setdefault(limit, time.monotonic() + limit)  # all of them together, not one after the other
        saver.close(limit_s=max(0.0, ends - time.monotonic()))


def _close_beside(group: _Group) -> None:
    """Their process group is gone. Not on this thread: whatever it does, it did not ask to wait."""
    savers = list(group.savers.values())
    group.savers.clear()
    if savers:
        apart("elastickpt-close", partial(_close, savers)).start()


def _forked() -> None:
    """A child process has no threads of its parent's savers, and makes savers of its own if it saves."""
    global _ALONE, _CHANGING
    _GROUPS.clear()
    _ALONE, _CHANGING = _Group(), threading.Lock()


atexit.register(close_all)
os.register_at_fork(after_in_child=_forked)


def async_save(
    state: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    step: SupportsIndex | None = None,
    process_group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    placement: PlacementChoice = "auto",
    durability: Durability = "power",
    replicas: Replicas = "owner",
    options: AsyncOptions = DEFAULT,
) -> SaveHandle:
    """Takes a copy of `state` and returns; the checkpoint at `path` comes beside training.

    On return host tensors may change. Tensors of a GPU may be read but not changed before `SaveHandle.wait_staged`, for
    which a step of any `torch.optim.Optimizer` waits by itself. The call blocks for the copy, for at most `stall_limit_s`
    until there is memory for it, and for a pass over tensors that are to be compared with other ranks (a GPU does it by
    itself); the first save of a structure, and one that goes in portions, also until all ranks agreed on it, for at most
    `stall_limit_s` again.

    The writer has the save when the ranks agreed on it, some milliseconds after the call returned: what is staged is lost
    if the process is killed before (its own end waits for that), and finished whatever becomes of it from then on.

    Every rank of the process group must call it with the same arguments, and in the same order as other saves.

    Args:
        state: As for `save`.
        path: As for `save`.
        step: As for `save`.
        process_group: As for `save`.
        mesh: As for `save`.
        placement: As for `save`.
        durability: As for `save`.
        replicas: As for `save`.
        options: Memory, limits, and who writes; the same on all ranks.

    Returns:
        The save under way; what goes wrong in it the handle says, on all ranks alike.

    Raises:
        Refused: This process is not in the group, or its savers have ended.

    Examples:
        >>> handle = ek.async_save(state, "out/step-2000", step=2000)
        >>> handle.result().step
        2000
    """
    saver = saver_of(job_group(process_group), options)
    destination = PathDestination.of(path, step_of(step))
    request = Request(destination.path, destination.step, placement, durability, replicas)
    return saver.save(state, destination, request, mesh=mesh)
