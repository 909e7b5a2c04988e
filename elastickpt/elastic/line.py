"""A member's connection to the coordinator, and the thread that holds it: it hears, sends beats, and sends what is left.

A thread that only waits for what will be heard hears it itself (`hear_until`): no other thread has to be woken first.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from elastickpt.elastic.stream import Closed, Stream
from elastickpt.errors import CheckpointError
from elastickpt.ranks.threads import apart

NAME = "elastickpt-job"


class Line:
    """`beat` gives what to say as a sign of life, and in how many seconds to say it again; `hear` takes each message, `lost`
    why nothing more will come. All three are called by one thread at a time, `hear` and `lost` in that of the line or in
    `hear_until`."""

    def __init__(
        self,
        stream: Stream,
        *,
        beat: Callable[[], tuple[bytes, float]],
        hear: Callable[[bytes], None],
        lost: Callable[[str], None],
    ) -> None:
        self._stream, self._beat, self._hear, self._lost = stream, beat, hear, lost
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = self._ended = self._heard_elsewhere = False
        self._hearing = threading.Lock()  # held by who receives
        self._watching, self._watched = threading.Lock(), 0
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)
        self._thread = apart(NAME, self._serve)

    def open(self) -> None:
        """From now on it is heard."""
        self._thread.start()

    def say(self, message: bytes) -> None:
        """Sends it. Not blocking, from any thread."""
        self._stream.send(message)
        if self._stream.waits:
            self.beat_now()

    def beat_now(self) -> None:
        """Gives a sign of life without waiting for its time."""
        with suppress(OSError):  # closed already
            os.eventfd_write(self._wake, 1)

    def hear_until(self, holds: Callable[[], bool], limit_s: float | None = None) -> bool:
        """Hears messages until `holds()`, which only they, and the end of the line, can bring about; whether it does within the
        limit. What nothing can bring about any more is waited for all the same. Blocking; for one thread at a time."""
        until = None if limit_s is None else time.monotonic() + limit_s
        with self._hearing:
            if self._ended and not holds():
                threading.Event().wait(limit_s)
            if self._ended or holds():
                return holds()
            self._heard_elsewhere = True
            self._watch()
            poll = select.poll()
            poll.register(self._stream, select.POLLIN)
            try:
                while not holds() and not self._ended:
                    left = None if until is None else until - time.monotonic()
                    if left is not None and left <= 0:
                        return False
                    if poll.poll(None if left is None else 1000 * left):
                        self._receive()
                return holds()
            finally:
                self._heard_elsewhere = False
                self._watch()

    def close(self) -> None:
        """Ends thread and connection. The second call does nothing."""
        if not self._closing:
            self._closing = True
            self.beat_now()
            self._thread.join()
            self._stream.close()
            self._poll.close()
            os.close(self._wake)

    def _watch(self) -> None:
        """The line's thread is woken for what it is to do, and for nothing else."""
        with self._watching:
            wanted = 0 if self._heard_elsewhere or self._ended else select.EPOLLIN
            wanted |= select.EPOLLOUT if self._stream.waits else 0
            if wanted == self._watched or self._closing:
                return
            if not wanted:
                self._poll.unregister(self._stream)
            elif self._watched:
                self._poll.modify(self._stream, wanted)
            else:
                self._poll.register(self._stream, wanted)
            self._watched = wanted

    def _serve(self) -> None:
        beat_at = 0.0
        with suppress(OSError), open("/proc/thread-self/comm", "w") as comm:
            comm.write(NAME)  # for `top -H`, and who else asks what this thread takes
        while not self._closing and not self._ended:
            if time.monotonic() >= beat_at:
                message, again_s = self._beat()
                self._stream.send(message)
                beat_at = time.monotonic() + again_s
            self._watch()
            for descriptor, _ in self._poll.poll(max(0.0, beat_at - time.monotonic())):
                if descriptor == self._wake:
                    os.eventfd_read(self._wake)
                    beat_at = 0.0
                    continue
                self._stream.flush()
                if self._hearing.acquire(blocking=False):  # else it is heard elsewhere
                    try:
                        self._receive()
                    finally:
                        self._hearing.release()

    def _receive(self) -> None:
        """Takes what has come."""
        if self._ended:
            return
        self._stream.flush()
        try:
            for data in self._stream.receive():
                self._hear(data)
        except Closed:
            self._end("the connection to the coordinator ended")
        except CheckpointError as error:
            self._end(f"the coordinator said what cannot be understood: {error}")

    def _end(self, why: str) -> None:
        self._ended = True
        self._lost(why)
        if not self._closing:
            self.beat_now()
