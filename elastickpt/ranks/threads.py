"""Threads, all that there are: one that alone touches what belongs to it, those that carry out what they are given, in order or
shared out, and one that does a single thing.

another thread   --- leave(command) --->   the mailbox   --- carry_out() --->   the actor's thread
a socket         --- registered with `sockets` ------------- wait() ------->

Those that work beside training may have a lower priority. Linux keeps it per thread; threads made later inherit it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import selectors
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, Self, TypeVar

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike


class Sockets:
    """What an actor waits for beside its commands. It takes its two descriptors with the first socket, and none before: the
    writer of a job of one rank has no socket ever."""

    def __init__(self) -> None:
        self._selector: selectors.BaseSelector | None = None
        self._woken = -1

    def __bool__(self) -> bool:
        return self._selector is not None

    def register(self, socket: FileDescriptorLike, data: object = None) -> None:
        """From the actor's thread, or before it starts."""
        if self._selector is None:
            self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(socket, selectors.EVENT_READ, data)

    def unregister(self, socket: FileDescriptorLike) -> None:
        if self._selector is not None:
            self._selector.unregister(socket)

    def readable(self, limit_s: float | None) -> list[selectors.SelectorKey]:
        """Those that can be read; returns early when it is woken. Blocking at most for the limit, None: for none."""
        ready = []
        for key, _ in self._selector.select(limit_s) if self._selector is not None else ():
            if key.fileobj == self._woken:
                os.eventfd_read(self._woken)
            else:
                ready.append(key)
        return ready

    def wake(self) -> None:
        """From any thread."""
        if self._woken >= 0:
            os.eventfd_write(self._woken, 1)

    def close(self) -> None:
        if self._selector is not None:
            self._selector.close()
            os.close(self._woken)
            self._selector, self._woken = None, -1


def apart(name: str, work: Callable[[], object]) -> threading.Thread:
    """A thread for one thing, to be started; the end of the process does not wait for it."""
    return threading.Thread(target=work, name=name, daemon=True)


def later(name: str, seconds: float, work: Callable[[], object]) -> None:
    """Does one thing so many seconds later, unless the process has ended by then. Not blocking."""
    timer = threading.Timer(seconds, work)
    timer.name, timer.daemon = name, True
    timer.start()


class Postponed:
    """One thing that is done so many seconds after it was asked for, once for all who ask until then."""

    def __init__(self, name: str, seconds: float, work: Callable[[], object]) -> None:
        self._name, self._seconds, self._work = name, seconds, work
        self._asking = threading.Lock()
        self._asked = False

    def ask(self) -> None:
        """From any thread; not blocking."""
        with self._asking:
            asked, self._asked = self._asked, True
        if not asked:
            later(self._name, self._seconds, self._begin)

    def _begin(self) -> None:
        with self._asking:
            self._asked = False
        self._work()


class Actor:
    """`run` is what the thread does, from `start` on; it calls `wait` and `carry_out` by turns, and `end` when it is over."""

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self.sockets = Sockets()
        self._commands: deque[Callable[[], None]] = deque()
        self._leaving = threading.Condition()
        self._over = False
        self._idle = threading.Event()
        self._idle.set()
        self._thread = apart(name, run)

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
            self.sockets.wake()
            self._leaving.notify()
            return True

    def idle_within(self, limit_s: float) -> bool:
        """Whether the actor comes to rest within the limit, with no command left. Blocking."""
        return self._idle.wait(limit_s)

    def join(self, limit_s: float) -> None:
        """Waits at most so long for the thread to end."""
        self._thread.join(limit_s)

    # -- from the actor's own thread -----------------------------------------------------------------------------------

    def wait(self, limit_s: float | None) -> list[selectors.SelectorKey]:
        """The sockets that can be read; returns early for a command. Blocking at most for the limit, None: for none."""
        if self.sockets:  # a command that came before there was one has woken nobody
            return self.sockets.readable(0.0 if self._commands else limit_s)
        with self._leaving:
            self._leaving.wait_for(lambda: bool(self._commands), limit_s)
        return []

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
        self.sockets.close()
        return tuple(self._commands)


T = TypeVar("T")

log = logging.getLogger(__name__)


class WorkerThread:
    """A thread that carries out what is put, in order; started by the first. What one raises is logged, and ends nothing."""

    def __init__(self, name: str) -> None:
        self._actor = Actor(name, self._run)
        self._starting = threading.Lock()
        self._started = self._stopped = False

    def put(self, work: Callable[[], None]) -> None:
        """Carried out after what was put before; not blocking. From any thread."""
        self._actor.leave(work)
        with self._starting:
            if not self._started:
                self._started = True
                self._actor.start()

    def stop(self) -> None:
        """Ends after what was put; not blocking."""
        self._actor.leave(self._stop)

    def join(self, limit_s: float) -> None:
        """After `stop`: waits at most so long for what was put. Blocking."""
        if self._started:
            self._actor.join(limit_s)

    def _stop(self) -> None:
        self._stopped = True

    def _run(self) -> None:
        while not self._stopped:
            self._actor.wait(None)
            try:
                self._actor.carry_out()
            except Exception:
                log.exception("work beside training met a fault of its own")
        self._actor.end()


class Pool:
    """So many threads at most, for work that is shared out; they begin as there is some, and end with the pool. A context
    manager that closes it."""

    def __init__(self, name: str, threads: int) -> None:
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def share_out(self, items: Sequence[T], work: Callable[[T], object]) -> None:
        """Does the work for each item; each thread takes the next one, in their order. Blocking: once it returns or raises, no
        thread is at work.

        Raises the first failure, after which no item is begun. The calling thread does it alone where one is enough, and where
        no thread begins any more: a process at its end waits for what is still written.
        """
        if min(len(items), self._threads) <= 1:
            for item in items:
                work(item)
            return
        pending, taking, ended = iter(items), threading.Lock(), threading.Event()

        def work_off() -> None:
            while not ended.is_set():
                with taking:
                    item = next(pending, _NOTHING)
                if isinstance(item, _Nothing):
                    return
                try:
                    work(item)
                except BaseException:
                    ended.set()
                    raise

        futures: list[Future[None]] = []
        with suppress(RuntimeError):  # no thread begins any more
            for _ in range(min(self._threads, len(items))):
                futures.append(self._executor.submit(work_off))  # noqa: PERF401  # those before an error count
        if not futures:
            work_off()
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # an interrupt, too
            failed_first = [future for future in futures if future.done() and future.exception() is not None]
            if failed_first or any(not future.done() for future in futures):
                ended.set()
            wait(futures)
        for future in (*failed_first, *futures):
            future.result()

    def begin(self, work: Callable[[], T]) -> Future[T]:
        """Does it meanwhile, or at once where no thread begins any more. Its result is that of the work."""
        try:
            return self._executor.submit(work)
        except RuntimeError:
            done: Future[T] = Future()
            done.set_result(work())
            return done

    def abandon(self) -> None:
        """As `close`, and what has not begun never does."""
        self._executor.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Ends the threads once what they do is done. Blocking."""
        self._executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Nothing:
    """There is no item left."""


_NOTHING = _Nothing()


IoPriority = Literal["normal", "low", "idle"]

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # numbers of the system call, which libc does not wrap
_LEVELS = {"low": (2 << 13) | 7, "idle": 3 << 13}  # class in the upper bits: 2 is best effort, with a level; 3 is idle
_THIS_THREAD = (1, 0)  # IOPRIO_WHO_PROCESS, the caller


def lower(niceness: int, io: str) -> None:
    """Applies to the calling thread and to threads that it makes from now on; what the system refuses is left as it is."""
    if niceness:
        with suppress(OSError):
            os.nice(niceness)
    call = _IOPRIO_SET.get(platform.machine())
    if io in _LEVELS and call is not None:
        ctypes.CDLL(None).syscall(call, *_THIS_THREAD, _LEVELS[io])
