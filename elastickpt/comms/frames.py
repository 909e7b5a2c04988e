"""Messages on a stream socket: a length, a kind, the number of the round, and bytes."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

from elastickpt.errors import LimitExceeded

_HEADER = struct.Struct("<QBI")
MAX_FRAME_NBYTES = 1 << 31  # far above any structure table; a peer that announces more is not ours


class Kind(IntEnum):
    HELLO = 0
    PAYLOAD = 1
    FAILURE = 2
    BEAT = 3  # "alive and working"; carries nothing
    VERDICT = 4
    REPORT = 5  # the round failed somewhere: everybody raises the same report


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    round: int
    data: bytes


class PeerGone(Exception):
    """The other end closed the connection or its process ended."""


class PeerSilent(Exception):
    """The other end sent nothing, not even a beat, within the limit."""


class Connection:
    """One peer. Beats may come from another thread; sending frames and receiving belong to one."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._unsent = b""  # the rest of a beat that the kernel took a part of
        self._buffer = bytearray()
        self._frames: deque[Frame] = deque()
        self.heard_at = time.monotonic()
        sock.setblocking(True)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, frame: Frame, *, silence_s: float) -> None:
        """Blocks until the kernel took all of it, and receives meanwhile what the peer sends.

        Raises PeerGone, and PeerSilent if the kernel takes no more and nothing was heard for `silence_s`: a part may be on
        its way then, so the connection is of no use any more.
        """
        with self._sending:
            header = _HEADER.pack(len(frame.data), frame.kind, frame.round)
            left = memoryview(b"".join((self._unsent, header, frame.data)))
            self._unsent = b""
            begun = time.monotonic()
            while left := left[self._push(left) :]:
                self._await_room(begun, silence_s)

    def beat(self, round_number: int) -> None:
        """Says that this process is alive; not blocking: skipped when a message is on its way, which says the same, and when
        the peer takes nothing at the moment."""
        if self._sending.acquire(blocking=False):
            try:
                data = self._unsent or _HEADER.pack(0, Kind.BEAT, round_number)
                taken = self._push(data)
                self._unsent = data[taken:] if taken or self._unsent else b""
            except PeerGone:
                pass  # whoever receives on this connection finds out and reports it
            finally:
                self._sending.release()

    def end(self) -> None:
        """Both ends find the connection closed from now on."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _push(self, data: bytes | memoryview) -> int:
        """How many bytes of it the kernel takes now."""
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise PeerGone(str(error)) from error

    def _await_room(self, begun: float, silence_s: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
            ready = selector.select(timeout=min(1.0, silence_s))
        if any(events & selectors.EVENT_READ for _, events in ready):
            self.pump()
        elif not ready and time.monotonic() - max(self.heard_at, begun) > silence_s:
            raise PeerSilent

    def _cut(self) -> Frame | None:
        if len(self._buffer) < _HEADER.size:
            return None
        nbytes, kind, number = _HEADER.unpack_from(self._buffer)
        if nbytes > MAX_FRAME_NBYTES:
            raise LimitExceeded(f"a peer announced a message of {nbytes} bytes; the limit is {MAX_FRAME_NBYTES}")
        end = _HEADER.size + nbytes
        if len(self._buffer) < end:
            return None
        data = bytes(self._buffer[_HEADER.size : end])
        del self._buffer[:end]
        return Frame(Kind(kind), number, data)

    def pump(self) -> None:
        """Reads once; call when readable. Complete frames, beats left out, wait to be taken. Raises PeerGone."""
        try:
            data = self._socket.recv(1 << 20)
        except OSError as error:
            raise PeerGone(str(error)) from error
        if not data:
            raise PeerGone("connection closed")
        self.heard_at = time.monotonic()
        self._buffer += data
        while (frame := self._cut()) is not None:
            if frame.kind is not Kind.BEAT:
                self._frames.append(frame)

    def hear_out(self) -> None:
        """Reads what came before a connection broke; call after PeerGone."""
        with suppress(PeerGone):
            while True:
                self.pump()

    def take(self) -> Frame | None:
        """The next frame that was read, in order; None if there is none yet."""
        return self._frames.popleft() if self._frames else None

    def close(self) -> None:
        self._socket.close()
