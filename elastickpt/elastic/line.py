"""A member's connection to the coordinator, and the thread that holds it: it hears, sends beats, and sends what is left."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable
from contextlib import suppress

from elastickpt.elastic.stream import Closed, Stream
from elastickpt.errors import CheckpointError
from elastickpt.ranks.threads import apart

NAME = "elastickpt-job"


class Line:
    """`beat` gives what to say as a sign of life, and in how many seconds to say it again; `hear` takes each message, `lost`
    why nothing more will come. All three are called in the thread of the line."""

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
        self._closing = False
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

    def close(self) -> None:
        """Ends thread and connection. The second call does nothing."""
        if not self._closing:
            self._closing = True
            self.beat_now()
            self._thread.join()
            self._stream.close()
            os.close(self._wake)

    def _serve(self) -> None:
        beat_at = 0.0
        with suppress(OSError), open("/proc/thread-self/comm", "w") as comm:
            comm.write(NAME)  # for `top -H`, and who else asks what this thread takes
        with selectors.DefaultSelector() as selector:
            selector.register(self._stream, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._closing:
                if time.monotonic() >= beat_at:
                    message, again_s = self._beat()
                    self._stream.send(message)
                    beat_at = time.monotonic() + again_s
                selector.modify(self._stream, selectors.EVENT_READ | (selectors.EVENT_WRITE if self._stream.waits else 0))
                for key, _ in selector.select(max(0.0, beat_at - time.monotonic())):
                    if key.fileobj is not self._stream:
                        os.eventfd_read(self._wake)
                        beat_at = 0.0
                    elif not self._receive():
                        return

    def _receive(self) -> bool:
        """Takes what has come; whether anything can still come."""
        self._stream.flush()
        try:
            for data in self._stream.receive():
                self._hear(data)
        except Closed:
            self._lost("the connection to the coordinator ended")
        except CheckpointError as error:
            self._lost(f"the coordinator said what cannot be understood: {error}")
        else:
            return True
        return False
