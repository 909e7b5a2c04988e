"""Messages on a stream socket between a job's processes: a length, then bytes; and how both ends prove the job's token.

    listener   a nonce
    caller     a nonce of its own, and its proof of the listener's
    listener   its proof of the caller's

The token itself is never sent; who does not know it learns nothing, and is turned away.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import threading
from contextlib import suppress
from hashlib import blake2b

from elastickpt.errors import LimitExceeded

_LENGTH = struct.Struct("<I")
MAX_NBYTES = 1 << 24  # of one message; what members tell each other through the coordinator is small
NONCE_NBYTES = 32
_PIECE_NBYTES = 1 << 16


class Closed(Exception):
    """The other end closed the connection, or its process or host is gone."""


class Stream:
    """One end. Any thread may send; one at a time receives. Nothing here blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._unsent = bytearray()
        self._read = bytearray()
        sock.setblocking(False)
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)  # a host that is gone is found out in 20 s

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def waits(self) -> bool:
        """Whether something is left to be sent, by `flush` once the socket takes more."""
        return bool(self._unsent)

    def send(self, message: bytes) -> None:
        """Sends what the kernel takes now and keeps the rest. A connection that is closed takes everything: whoever receives
        finds out."""
        with self._sending:
            self._unsent += _LENGTH.pack(len(message)) + message
            self._push()

    def flush(self) -> None:
        """Sends more of what is left."""
        with self._sending:
            self._push()

    def _push(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()

    def receive(self) -> list[bytes]:
        """The messages that are there now, in order. Raises Closed where there are none and never will be, and
        LimitExceeded."""
        closed = False
        try:
            while data := self._socket.recv(_PIECE_NBYTES):
                self._read += data
                if len(data) < _PIECE_NBYTES:
                    break  # that is all for now; whether more can come is asked when the socket is readable again
            closed = not data
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        found = self._cut()
        if closed and not found:
            raise Closed
        return found

    def receive_one(self) -> bytes | None:
        """The next message alone; None while there is none. Raises as `receive` does."""
        found = self._cut(1)
        if not found:
            try:
                self._read += self._socket.recv(_PIECE_NBYTES) or _closed()
            except BlockingIOError:
                return None
            except OSError as error:
                raise Closed from error
            found = self._cut(1)
        return found[0] if found else None

    def _cut(self, limit: int | None = None) -> list[bytes]:
        found: list[bytes] = []
        while len(self._read) >= _LENGTH.size and len(found) != limit:
            (nbytes,) = _LENGTH.unpack_from(self._read)
            if nbytes > MAX_NBYTES:
                raise LimitExceeded(f"a message of {nbytes} bytes was announced; the limit is {MAX_NBYTES}")
            end = _LENGTH.size + nbytes
            if len(self._read) < end:
                break
            found.append(bytes(self._read[_LENGTH.size : end]))
            del self._read[:end]
        return found

    def close_here(self) -> None:
        """Of a forked process: closes its copy, and nobody else's."""
        self._socket.close()

    def close(self) -> None:
        """Sends what the kernel takes of the rest, and closes both ways."""
        self.flush()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _closed() -> bytes:
    raise Closed


def new_token() -> str:
    return secrets.token_hex(32)


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_NBYTES)


def called(theirs: bytes, token: str) -> tuple[bytes, bytes]:
    """What a caller answers to the listener's nonce, and which proof it expects back."""
    mine = nonce()
    return mine + _proof(b"caller", token, theirs), _proof(b"listener", token, mine)


def admitted(answer: bytes, mine: bytes, token: str) -> bytes | None:
    """What a listener says to a caller that answered its nonce; None to one that does not know the token."""
    theirs, proof = answer[:NONCE_NBYTES], answer[NONCE_NBYTES:]
    if len(theirs) != NONCE_NBYTES or not hmac.compare_digest(proof, _proof(b"caller", token, mine)):
        return None
    return _proof(b"listener", token, theirs)


def _proof(side: bytes, token: str, of: bytes) -> bytes:
    return blake2b(of, key=blake2b(token.encode()).digest(), person=side).digest()
