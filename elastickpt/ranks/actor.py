"""A thread that alone touches what belongs to it: others leave it commands, and it waits for those and for its sockets.

another thread   --- leave(command) --->   the mailbox   --- carry_out() --->   the actor's thread
a socket         --- registered with `selector` ------------ wait() ------->
"""

from __future__ import annotations

import os
import selectors
import threading
from collections import deque
from collections.abc import Callable


class Actor:
    """`run` is what the thread does, from `start` on; it calls `wait` and `carry_out` by turns, and `end` when it is over."""

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self.selector = selectors.DefaultSelector()
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.selector.register(self._woken, selectors.EVENT_READ)
        self._commands: deque[Callable[[], None]] = deque()
        self._leaving = threading.Lock()
        self._over = False
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- from any thread -----------------------------------------------------------------------------------------------

    def leave(self, command: Callable[[], None]) -> bool:
        """Has the actor's thread carry it out; not blocking. False after the actor's end: then nobody does."""
        with self._leaving:
            if self._over:
                return False
            self._idle.clear()
            self._commands.append(command)
            os.eventfd_write(self._woken, 1)
            return True

    def idle_within(self, limit_s: float) -> bool:
        """Whether the actor comes to rest within the limit, with no command left. Blocking."""
        return self._idle.wait(limit_s)

    def join(self, limit_s: float) -> None:
        """Waits at most so long for the thread to end."""
        self._thread.join(limit_s)

    # -- from the actor's own thread -----------------------------------------------------------------------------------

    def wait(self, limit_s: float | None) -> list[selectors.SelectorKey]:
        """What of the selector is ready; returns early for a command. Blocking at most for the limit, None: for none."""
        ready = []
        for key, _ in self.selector.select(limit_s):
            if key.fileobj == self._woken:
                os.eventfd_read(self._woken)
            else:
                ready.append(key)
        return ready

    def carry_out(self) -> None:
        """All commands that were left, in order. Raises what one raises: those behind it stay."""
        while self._commands:
            self._commands.popleft()()

    def rest(self) -> None:
        """There is nothing to do but what others may have left meanwhile."""
        with self._leaving:
            if not self._commands:
                self._idle.set()

    def end(self) -> tuple[Callable[[], None], ...]:
        """Takes no more commands, and closes its own descriptors; what was left and not carried out."""
        with self._leaving:
            if self._over:
                return ()
            self._over = True
        self.selector.close()
        os.close(self._woken)
        return tuple(self._commands)
