"""The trainer of this process answers who asks whether it lives, from a thread of its own. [RUN-48, RUN-64]"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import time
import weakref
from dataclasses import dataclass, field
from ipaddress import ip_address

from elastickpt.errors import Refused
from elastickpt.ranks.processes import socket_identity
from elastickpt.ranks.threads import apart
from elastickpt.runs.trainer_address import QUESTION_NBYTES, TrainerAddress, answer

PATIENCE_S = 1.0  # for a question to be whole
PAUSE_S = 0.05
MAX_ASKERS = 64  # at once; the kernel keeps others waiting


@dataclass(slots=True)
class _Asker:
    socket: socket.socket
    until: float
    asked: bytearray = field(default_factory=bytearray)


class Answering:
    """Answers at `address` for the tokens of this job's claims, until `close()` or the end of the process.

    A process forked from this one does not answer, nor keep the address. Not blocking; from any thread. `tcp_host`, a name or
    address of this host, lets other hosts ask too. Raises Refused where that is none.
    """

    def __init__(self, *, tcp_host: str | None = None) -> None:
        name = f"elastickpt-trainer-{secrets.token_hex(16)}"
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        local.bind(f"\0{name}")
        self._listeners = [local]
        tcp = None
        if tcp_host is not None:
            try:
                self._listeners.append(_listen_on(tcp_host))
            except BaseException:
                local.close()
                raise
            tcp = self._listeners[1].getsockname()[:2]
        self._address = str(TrainerAddress(name, socket_identity(), tcp))
        self._tokens: tuple[str, ...] = ()
        self._process = os.getpid()
        self._wake, self._woken = socket.socketpair()
        self._askers: dict[int, _Asker] = {}
        for listener in self._listeners:
            listener.listen(MAX_ASKERS)
            listener.setblocking(False)
        self._thread = apart("elastickpt-answering", self._serve)
        _OPEN.add(self)
        self._thread.start()

    @property
    def address(self) -> str:
        """For the claims of this job."""
        return self._address

    def answer_for(self, token: str) -> None:
        """From now on also for a claim with this token; before the claim is made."""
        self._tokens = (*self._tokens, token)

    def close(self) -> None:
        """Nobody answers from now on. The second call does nothing."""
        if self._process != os.getpid():
            return
        self._process = 0
        self._wake.send(b"x")
        self._thread.join(PATIENCE_S)
        self._close_sockets()

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_sockets(self) -> None:
        for one in (*self._listeners, *(asker.socket for asker in self._askers.values()), self._wake, self._woken):
            one.close()

    def _serve(self) -> None:
        with selectors.PollSelector() as selector:  # of no kernel state that a forked process would share
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ, self._accept)
            selector.register(self._woken, selectors.EVENT_READ, None)
            while self._process:
                waiting = min((asker.until for asker in self._askers.values()), default=None)
                ready = selector.select(None if waiting is None else max(0.0, waiting - time.monotonic()))
                for key, _ in ready:
                    if key.data is not None:
                        key.data(selector, key.fileobj)
                for asker in [one for one in self._askers.values() if one.until <= time.monotonic()]:
                    self._dismiss(selector, asker)

    def _accept(self, selector: selectors.BaseSelector, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            time.sleep(PAUSE_S)  # without descriptors it would be asked again at once, and for ever
            return
        if len(self._askers) >= MAX_ASKERS:
            connection.close()
            return
        connection.setblocking(False)
        self._askers[connection.fileno()] = _Asker(connection, time.monotonic() + PATIENCE_S)
        selector.register(connection, selectors.EVENT_READ, self._hear)

    def _hear(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        asker = self._askers[connection.fileno()]
        try:
            data = connection.recv(QUESTION_NBYTES - len(asker.asked))
            asker.asked += data
            if data and len(asker.asked) < QUESTION_NBYTES:
                return
            if data:
                connection.send(answer(bytes(asker.asked), self._tokens))  # fits into any socket's empty buffer
        except OSError:
            pass
        self._dismiss(selector, asker)

    def _dismiss(self, selector: selectors.BaseSelector, asker: _Asker) -> None:
        selector.unregister(asker.socket)
        del self._askers[asker.socket.fileno()]
        asker.socket.close()


def _listen_on(host: str) -> socket.socket:
    """A socket bound to an address of this host that others can be told."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
    except OSError as error:
        raise Refused(f"tcp_host {host!r}: expected a name or address of this host, found {error}") from error
    try:
        if "%" in str(place[0]) or ip_address(place[0]).is_unspecified:
            raise Refused(f"tcp_host {host!r}: expected an address that others can be told, found {place[0]}")
        found.bind(place)
    except OSError as error:
        found.close()
        raise Refused(f"tcp_host {host!r}: expected a name or address of this host, found {place[0]}: {error}") from error
    except BaseException:
        found.close()
        raise
    return found


_OPEN: weakref.WeakSet[Answering] = weakref.WeakSet()


def _forget() -> None:
    """In a forked process: its copies of the sockets would keep the address alive after the trainer's end."""
    for one in list(_OPEN):
        one._close_sockets()


os.register_at_fork(after_in_child=_forget)
