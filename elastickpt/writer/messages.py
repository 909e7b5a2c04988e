"""What a trainer and its writer process tell each other: the whole protocol, on a Unix stream socket.

A message is a length, then msgpack; descriptors go beside it.

    trainer -> writer                                      writer -> trainer
    WriterSettings  first; how to behave                   WriterReady its answer: imported and waiting
    ArenaHere   with a descriptor: an arena to read from   Alive       each `beat_s`
    ArenaGone   no job will name it again: unmap it        BytesWritten  of a job's portion, so far
    StructureHere   what all saves of a structure share,   PortionDone the portion is written, and after the last one
                by digest; sent once                                   attested
    StructureGone   no job will name it again              JobFailed   the job ended; nothing more is done for it
    SeatHere    with a descriptor, if it listens: where
                it sits among a team's writers, for the
                jobs that follow                           Decided     what became of the attempt of a job that enrolled
    SeatGone    no job of it comes any more: leave it once
                all is decided there
    MarkHere    with a descriptor: the mark of an attempt,
                to be held until that is decided
    Enroll      before Write or Say: take part in the
                decision of a job's attempt
    Write       a portion of a job is staged, or begins to be:
                write it
    Say         a job's attempt is attested, or failed
    Settle      its team is gone: an attempt that is open is
                found committed now, or aborted
    Cancel      end the job as soon as may be
    EndNow      whatever is left

1. Every Write is answered by exactly one PortionDone or JobFailed, in the order of the Writes, if the writer lives.
2. A Write names only arenas and structures that came before it. From Write to its answer the writer reads of the arena what
   this says is filled, and waits for more: the trainer may still be filling it.
3. A Write can be repeated (`repeated`), to the same or another writer, once the one before is known to be dead: it puts the
   same bytes in the same places. What the dead one made is completed if it is a part of what this one makes, else it is an
   error.
4. Bytes of a portion that is not the last are as durable as asked when PortionDone is sent, so that no later writer needs them
   again.
5. After the last portion of a job that enrolled, or its first that failed, or a Say, comes one Decided. A Say repeats what a
   writer that is gone had said, or says that the trainer takes no part; the arena is no concern of it.
6. When the connection or the trainer's process ends, the writer finishes the last portions it was given, then ends; at the
   latest `lease_s` later. It ends no attempt before it is decided. Earlier portions are dropped, and a portion that was not
   staged to its end fails: nobody is left to stage what follows.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from typing import cast

from elastickpt.commit.attempt import Attempt, Decision
from elastickpt.commit.links import CommitLimits
from elastickpt.format.records import FileDigest
from elastickpt.ranks.messages import Message, PeerGone
from elastickpt.ranks.messages import decode as decode_message
from elastickpt.ranks.messages import encode as encode_message


class WriterSettings(Message, frozen=True, tag=True):
    """`trainer` is a process id. `niceness` 0 and `io` "normal" leave priorities alone. `wrap` is for tests: a function
    "module:name:argument" that gets each store and the argument, and returns the store to use."""

    trainer: int
    beat_s: float
    lease_s: float
    niceness: int
    io: str
    wrap: str


class ArenaHere(Message, frozen=True, tag=True):
    arena: int
    nbytes: int


class ArenaGone(Message, frozen=True, tag=True):
    arena: int


class StructureHere(Message, frozen=True, tag=True):
    """`plan` as `Prepared.encoded`, `outline` as `WriterStructure.encoded_outline`."""

    structure: str
    plan: bytes
    outline: bytes


class StructureGone(Message, frozen=True, tag=True):
    structure: str


class SeatHere(Message, frozen=True, tag=True):
    """A `Seat`; one with the secret of an earlier one is that. `listening`: its listener comes with this message."""

    member: int
    ranks: tuple[int, ...]
    candidates: tuple[str, ...]
    secret: bytes
    limits: CommitLimits
    listening: bool


class SeatGone(Message, frozen=True, tag=True):
    secret: bytes


class MarkHere(Message, frozen=True, tag=True):
    attempt: str


class Enroll(Message, frozen=True, tag=True):
    """`structure` by its digest, "" for none: whose outline, and `values` (`contents.encode_values`), a committer needs."""

    job: int
    attempt: Attempt
    structure: str
    values: bytes


class Write(Message, frozen=True, tag=True):
    """`beside` as `Share.beside`; `earlier` are the checksums of all portions before, as little-endian 64-bit integers; both
    are used in the last portion."""

    job: int
    attempt: Attempt
    structure: str
    portion: int
    arena: int
    member: int
    beside: bytes
    earlier: bytes
    repeated: bool


class Say(Message, frozen=True, tag=True):
    """This rank's last word on the attempt with this id: an attestation, or a failure as (kind, message)."""

    job: int
    attempt: str
    attested: FileDigest | None
    failed: tuple[str, str] | None


class Settle(Message, frozen=True, tag=True):
    """The attempt with this id; `kind` and `message` are why it is aborted, if it is."""

    attempt: str
    kind: str
    message: str


class Cancel(Message, frozen=True, tag=True):
    job: int


class EndNow(Message, frozen=True, tag=True):
    pass


class WriterReady(Message, frozen=True, tag=True):
    pid: int


class Alive(Message, frozen=True, tag=True):
    pass


class BytesWritten(Message, frozen=True, tag=True):
    job: int
    nbytes: int


class PortionDone(Message, frozen=True, tag=True):
    """`checksums` of the portion's blocks, unless it was the last one: then none, and `file`, the attestation."""

    job: int
    nbytes: int
    checksums: bytes
    file: FileDigest | None


class JobFailed(Message, frozen=True, tag=True):
    job: int
    kind: str
    message: str


class Decided(Message, frozen=True, tag=True):
    job: int
    decision: Decision


ThingsHere = ArenaHere | StructureHere | SeatHere | MarkHere
ThingsGone = ArenaGone | StructureGone | SeatGone
ToWriter = WriterSettings | ThingsHere | ThingsGone | Enroll | Write | Say | Settle | Cancel | EndNow
FromWriter = WriterReady | Alive | BytesWritten | PortionDone | JobFailed | Decided
WriterMessage = ToWriter | FromWriter
_ANY = cast("type[WriterMessage]", WriterMessage)


def encode(message: WriterMessage) -> bytes:
    """The message with its name."""
    return encode_message(message)


def decode(data: bytes) -> WriterMessage:
    """What `encode` encoded. Raises InternalError for what it never makes."""
    return decode_message(data, _ANY)


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
