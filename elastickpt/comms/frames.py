"""Messages on a stream socket: a length, a kind, the number of the round, and bytes."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import deque
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
    """One peer. Sending is safe from several threads; receiving belongs to one."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._frames: deque[Frame] = deque()
        self.heard_at = time.monotonic()
        sock.setblocking(True)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, frame: Frame) -> None:
        """Blocks until the kernel took all of it. Raises PeerGone."""
        with self._sending:
            try:
                self._socket.sendall(_HEADER.pack(len(frame.data), frame.kind, frame.round) + frame.data)
            except OSError as error:
                raise PeerGone(str(error)) from error

    def beat(self, round_number: int) -> None:
        """Says that this process is alive; skipped when a message is on its way, which says the same."""
        if self._sending.acquire(blocking=False):
            try:
                self._socket.sendall(_HEADER.pack(0, Kind.BEAT, round_number))
            except OSError:
                pass  # whoever receives on this connection finds out and reports it
            finally:
                self._sending.release()

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

    def take(self) -> Frame | None:
        """The next frame that was read, in order; None if there is none yet."""
        return self._frames.popleft() if self._frames else None

    def close(self) -> None:
        self._socket.close()
