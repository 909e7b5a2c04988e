"""Where processes of a job meet: `unix:NAME`, an abstract socket of one host, or `tcp:HOST:PORT`.

A forked process must not keep such a socket: by its copies a name, or an address, would outlive its owner.
"""

from __future__ import annotations

import os
import secrets
import socket
import weakref
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address

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
