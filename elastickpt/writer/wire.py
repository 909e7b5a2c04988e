"""Messages, and descriptors beside them, on a Unix stream socket: a length, then msgpack."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence

from elastickpt.ranks.messages import PeerGone
from elastickpt.writer.messages import ArenaHere, MarkHere, SeatHere, WriterMessage, decode, encode

_LENGTH = struct.Struct("<Q")
_DESCRIPTORS = 16  # that may come with one read
_READ_NBYTES = 1 << 20


class Wire:
    """One end. Sending is safe from several threads; receiving belongs to one."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    def limit(self, seconds: float) -> None:
        """A `send` that the other end leaves waiting for so long raises PeerGone."""
        self._socket.settimeout(seconds)

    def send(self, message: WriterMessage, *, descriptors: Sequence[int] = ()) -> None:
        """Blocks until the kernel took all of it. Raises PeerGone."""
        with self._sending:
            self._send(message, descriptors)

    def send_if_free(self, message: WriterMessage) -> None:
        """Not at all while another thread sends: for beats, which that says as well. Raises PeerGone."""
        if self._sending.acquire(blocking=False):
            try:
                self._send(message, ())
            finally:
                self._sending.release()

    def receive(self) -> list[tuple[WriterMessage, int]]:
        """What came, from one read; with the descriptor that goes with it, else -1. Blocks until there is something;
        may return nothing. Raises PeerGone at the end, after everything before it was returned."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _READ_NBYTES, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise PeerGone(str(error)) from error
        self._descriptors.extend(descriptors)
        if not data:
            raise PeerGone("connection closed")
        self._buffer += data
        found: list[tuple[WriterMessage, int]] = []
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (nbytes,) = _LENGTH.unpack_from(self._buffer, at)
            end = at + _LENGTH.size + nbytes
            if len(self._buffer) < end:
                break
            message = decode(bytes(self._buffer[at + _LENGTH.size : end]))
            carries = isinstance(message, ArenaHere | MarkHere) or (isinstance(message, SeatHere) and message.listening)
            found.append((message, self._descriptors.popleft() if carries else -1))
            at = end
        del self._buffer[:at]
        return found

    def close(self) -> None:
        """Gives up the connection, and descriptors that nobody took. Not while another thread sends: `shut` first."""
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _send(self, message: WriterMessage, descriptors: Sequence[int]) -> None:
        data = encode(message)
        frame = memoryview(_LENGTH.pack(len(data)) + data)
        try:
            sent = socket.send_fds(self._socket, [frame], list(descriptors)) if descriptors else 0
            self._socket.sendall(frame[sent:])
        except OSError as error:  # also a timeout: what is half sent cannot be gone on with
            raise PeerGone(str(error)) from error
