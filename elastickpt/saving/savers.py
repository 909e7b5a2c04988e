"""The savers of this process: one for each process group and options, ended with the process, or with their group."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Iterable
from itertools import count

from elastickpt.ranks.process_group import Group
from elastickpt.saving.options import AsyncOptions
from elastickpt.saving.saver import Saver


class _Group:
    """The savers of one process group, in the order in which all of its ranks made them. It does not hold the group."""

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
        threading.Thread(target=_close, args=(savers,), name="elastickpt-close", daemon=True).start()


def _forked() -> None:
    """A child process has no threads of its parent's savers, and makes savers of its own if it saves."""
    global _ALONE, _CHANGING
    _GROUPS.clear()
    _ALONE, _CHANGING = _Group(), threading.Lock()


atexit.register(close_all)
os.register_at_fork(after_in_child=_forked)
