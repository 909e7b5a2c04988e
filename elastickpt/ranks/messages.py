"""Messages in flight, between ranks, trainers and writers: values with types in, the same out; and frames on a stream socket.

This is the one codec of what processes tell each other. Records on disk have decoders of their own, in `format`: their bytes
come from anywhere, and what is wrong with them is said exactly. Here both ends belong to one job and one release; where anybody
may call, `decode_from` refuses what is no message. A message is msgpack; a frame is a length, a kind, the number of the round,
and bytes.
"""

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
from functools import cache
from typing import Any, TypeVar

import msgspec

from elastickpt.errors import InternalError, LimitExceeded, Malformed

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one process tells another: its fields, in order. Where several kinds go over one connection, each is a subclass
    with `tag=True`, whose name goes first. Fields may be messages, frozen dataclasses, tuples and plain values."""


def encode(message: object) -> bytes:
    """The message as bytes: equal messages of equal types give equal bytes. Raises TypeError for what has no fields."""
    return _ENCODER.encode(message)


def decode(data: bytes, what: type[T]) -> T:
    """What `encode` encoded, of the type `what`, every part of it checked. Raises InternalError for anything else."""
    try:
        return _decoded(data, what)
    except _WRONG as error:
        name = getattr(what, "__name__", str(what))
        raise InternalError(
            f"a message between processes of this job: expected {name}, found {len(data)} bytes of something else ({error}); "
            "all processes of a job run one release of elastickpt: if these do, please report it"
        ) from error


def decode_from(sender: str, data: bytes, what: type[T]) -> T:
    """The same of a caller that may be anybody: `sender` says who it should be. Raises Malformed."""
    try:
        return _decoded(data, what)
    except _WRONG as error:
        raise Malformed(f"a message of a {sender}: {error}") from error


_WRONG = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _decoded(data: bytes, what: type[T]) -> T:
    found: T = _decoder(what).decode(data)  # type: ignore[arg-type]  # a type is hashable
    return found


def _plain(value: object) -> object:
    """What a subclass of a plain value is, as users' names and numbers may be. Raises TypeError for anything else."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    raise TypeError(f"no message carries a value of type {type(value).__name__}")


@cache
def _decoder(what: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(what)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)


_HEADER = struct.Struct("<QBI")
MAX_FRAME_NBYTES = 1 << 31  # far above any structure table; a peer that announces more is not ours


class FrameKind(IntEnum):
    HELLO = 0
    PAYLOAD = 1
    FAILURE = 2
    BEAT = 3  # "alive and working"; carries nothing
    VERDICT = 4
    REPORT = 5  # the round failed somewhere: everybody raises the same report
    ENTER = 6  # "I have made the call"; the round is the number of a call that is counted
    LEAVE = 7  # "I have given that call up"; carries why, as text
    LOSS = 8  # a rank whose process is certainly gone: one report
    WELCOME = 9  # the processes of all members
    LATE = 10  # member 0 waits for these members, who are late


@dataclass(frozen=True, slots=True)
class Frame:
    kind: FrameKind
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
        self.broken = False  # a frame went out in part only: what follows would not be understood
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
            try:
                while left := left[self._push(left) :]:
                    self._await_room(begun, silence_s)
            except BaseException:  # an interrupt too
                self.broken = True
                raise

    def beat(self, round_number: int) -> None:
        """Says that this process is alive; not blocking: skipped when a message is on its way, which says the same, and when
        the peer takes nothing at the moment."""
        self._offer(_HEADER.pack(0, FrameKind.BEAT, round_number), whole=False)

    def say(self, frame: Frame) -> None:
        """Sends as much of it as the peer takes now, and the rest with what follows. Not blocking, from any thread; left out
        where another message is on its way, or the peer is gone."""
        self._offer(_HEADER.pack(len(frame.data), frame.kind, frame.round) + frame.data, whole=True)

    def _offer(self, data: bytes, *, whole: bool) -> None:
        if self._sending.acquire(blocking=False):
            try:
                data = self._unsent + data if whole else self._unsent or data
                taken = self._push(data)
                self._unsent = data[taken:] if taken or self._unsent or whole else b""
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
        return Frame(FrameKind(kind), number, data)

    def pump(self) -> bool:
        """Reads once what is there, and says whether anything was. Complete frames, beats left out, wait to be taken. Not
        blocking. Raises PeerGone."""
        try:
            data = self._socket.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerGone(str(error)) from error
        if not data:
            raise PeerGone("connection closed")
        self.heard_at = time.monotonic()
        self._buffer += data
        while (frame := self._cut()) is not None:
            if frame.kind is not FrameKind.BEAT:
                self._frames.append(frame)
        return True

    def hear(self) -> bool:
        """Reads all that is there, and says whether the connection still stands. Not blocking."""
        try:
            while self.pump():
                pass
        except PeerGone:
            return False
        return True

    def take(self) -> Frame | None:
        """The next frame that was read, in order; None if there is none yet."""
        return self._frames.popleft() if self._frames else None

    def put_back(self, frame: Frame) -> None:
        """It is the next one again."""
        self._frames.appendleft(frame)

    def close(self) -> None:
        self._socket.close()
