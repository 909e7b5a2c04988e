"""Where processes of a job meet: `unix:NAME`, an abstract socket of one host, or `tcp:HOST:PORT`."""

from __future__ import annotations

import secrets
import socket

from elastickpt.comms.forks import not_in_forks


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
