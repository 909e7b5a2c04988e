"""How processes of a job find each other: by `unix:NAME`, an abstract socket of one host, or `tcp:HOST:PORT`, and member 0
by a door that it keeps open for as long as its team lives, whose address stands in the job's store.

    hub    what member 0 says: its host, where it listens on this host and beyond it, and the secret of its team
    far    set by a member on another host, for which member 0 then also listens by TCP

A hello carries the secret, so that nobody else can join. [SAVE-65] A forked process must not keep a socket that listens: by its
copies a name, or an address, would outlive its owner.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from typing import Protocol

from elastickpt.errors import CheckpointError, InternalError
from elastickpt.ranks.messages import Connection, Frame, FrameKind, Message, PeerGone, PeerSilent, decode, encode
from elastickpt.ranks.processes import Process

_OURS: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def not_in_forks(held: socket.socket) -> socket.socket:
    """The socket, which is closed in every process that is forked from this one by Python."""
    _OURS.add(held)
    return held


def _forked() -> None:
    for held in list(_OURS):
        held.close()


os.register_at_fork(after_in_child=_forked)


_FAR_AWAY = "192.0.2.1"  # of a network for documentation (RFC 5737): nobody's, and beyond every route but the default one


def listen(*, host: str | None, backlog: int = 128) -> tuple[socket.socket, str]:
    """A listening socket and its address; it belongs to the trainer, so that a revived writer keeps the address, and
    no process forked from that keeps it longer.

    `host` None: on this host only (an abstract Unix socket); else by TCP at that address.
    """
    if host is None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address = f"unix:elastickpt-{secrets.token_hex(16)}"
        listener.bind("\0" + address.removeprefix("unix:"))
    else:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((host, 0))
        address = f"tcp:{host}:{listener.getsockname()[1]}"
    listener.listen(backlog)
    return not_in_forks(listener), address


def own_address() -> str:
    """The address by which other hosts reach this one, an IPv4 address in digits.

    That of the interface with the route to the rest of the world; else what the host's own name says; else that of the first
    interface that is up. A loopback address, as which many hosts know their own name, only where there is nothing else.
    Blocking: it may ask the name service.
    """
    for found in _own_addresses():
        if _is_ours(found) and not ip_address(found).is_loopback:
            return found
    return "127.0.0.1"


def _is_ours(address: str) -> bool:
    """Whether an interface has it: what a name service says of this host need not hold in its container."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        try:
            bound.bind((address, 0))
        except OSError:
            return False
    return True


def _own_addresses() -> Iterator[str]:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as routed:
        routed.connect((_FAR_AWAY, 9))  # of a datagram socket: nothing is sent
        yield str(routed.getsockname()[0])
    with suppress(OSError):
        yield socket.gethostbyname(socket.gethostname())
    import psutil  # not for a writer, which only dials

    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        if name in states and states[name].isup:
            yield from (found.address for found in addresses if found.family == socket.AF_INET)


def dial(address: str, *, timeout_s: float) -> socket.socket:
    """A connection to whoever listens there; what it does later has the same limit until that is changed. Raises OSError."""
    kind, _, where = address.partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        target: object = "\0" + where
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        host, _, port = where.rpartition(":")
        target = (host, int(port))
    sock.settimeout(timeout_s)
    try:
        sock.connect(target)  # type: ignore[arg-type]  # a path or a (host, port) pair, as the family wants it
    except OSError:
        sock.close()
        raise
    return sock


HUB, FAR = "hub", "far"
HELLO_S = 10.0  # in which a caller says who it is
DIAL_S = 5.0


class KeyValue(Protocol):
    """The job's store: what a rank sets, every rank gets. Neither question blocks beyond its answer."""

    def set(self, key: str, value: bytes) -> None: ...

    def has(self, key: str) -> bool: ...

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Of a key that is set. Raises DeadlineExceeded."""
        ...


class Address(Message, frozen=True):
    """Where member 0 is: its host, and where it listens there and by TCP, "" for nowhere."""

    host: str
    near: str
    far: str
    secret: bytes


class Hello(Message, frozen=True):
    """Who a caller is, who knows the secret of the team."""

    secret: bytes
    member: int
    process: Process


class Door:
    """Member 0's end: listens, and finds out who calls."""

    def __init__(self, store: KeyValue, members: int, host: str) -> None:
        self._store, self._backlog = store, members + 16  # all may call before anybody listens
        self._secret = secrets.token_bytes(16)
        self._listeners = [near := listen(host=None, backlog=self._backlog)]
        self._address = Address(host, near[1], "", self._secret)
        self._callers: list[tuple[Connection, float]] = []
        store.set(HUB, encode(self._address))

    def look_for_far_members(self) -> bool:
        """Listens by TCP once a member on another host has asked for it; whether it began to now. One question to the store."""
        if self._address.far or not self._store.has(FAR):
            return False
        self._listeners.append(far := listen(host=own_address(), backlog=self._backlog))
        self._address = Address(self._address.host, self._address.near, far[1], self._secret)
        self._store.set(HUB, encode(self._address))
        return True

    @property
    def listeners(self) -> list[socket.socket]:
        """What is readable when somebody is at the door."""
        return [listener for listener, _ in self._listeners]

    @property
    def expects(self) -> bool:
        """Whether somebody has come in and not said yet who it is."""
        return bool(self._callers)

    def admitted(self) -> Iterator[tuple[Hello, Connection]]:
        """Those who have said hello by now; turns away whoever does not know the secret. Not blocking."""
        for listener, _ in self._listeners:
            listener.setblocking(False)
            while (caller := _accepted(listener)) is not None:
                self._callers.append((caller, time.monotonic()))
        waiting, self._callers = self._callers, []
        for caller, since in waiting:
            try:
                caller.pump()
                said = caller.take()
            except (PeerGone, CheckpointError, ValueError):
                caller.close()
                continue
            if said is None and time.monotonic() - since < HELLO_S:
                self._callers.append((caller, since))
                continue
            hello = None if said is None else self._known(said)
            if hello is None:
                caller.close()
            else:
                yield hello, caller

    def _known(self, said: Frame) -> Hello | None:
        """Who says hello; None for whoever does not know the secret."""
        try:
            hello = decode(said.data, Hello) if said.kind is FrameKind.HELLO else None
        except InternalError:  # a stranger
            return None
        return hello if hello is not None and secrets.compare_digest(hello.secret, self._secret) else None

    def close(self) -> None:
        for listener, _ in self._listeners:
            listener.close()
        for caller, _ in self._callers:
            caller.close()


def _accepted(listener: socket.socket) -> Connection | None:
    try:
        sock, _ = listener.accept()
    except OSError:  # nobody is there, or not any more
        return None
    return Connection(_kept_alive(not_in_forks(sock)))


def call_at(address: Address, hello: Hello) -> Connection:
    """A connection to member 0, which has been told who calls. Raises OSError if nobody listens there."""
    place = address.near if address.host == hello.process.host else address.far
    sock = _kept_alive(not_in_forks(dial(place, timeout_s=DIAL_S)))
    connection = Connection(sock)
    try:
        connection.send(Frame(FrameKind.HELLO, 0, encode(hello)), silence_s=DIAL_S)
    except (PeerGone, PeerSilent) as gone:
        connection.close()
        raise ConnectionError(str(gone)) from gone
    return connection


def _kept_alive(sock: socket.socket) -> socket.socket:
    """By TCP: a host that is gone is found out within half a minute, though nobody sends anything."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    return sock
