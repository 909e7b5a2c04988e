"""Where the writers of one job meet to commit: which member this one is, and where the candidates for committer listen."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass

from elastickpt.comms.forks import not_in_forks

CANDIDATES = 3  # members 0, 1, ... that may commit an attempt, in this order


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. A candidate that cannot be reached for `succession_s`, or that is connected and says nothing for `silence_s`, is
    passed over for the next one; a member that no committer has heard of for `missing_s` is lost. A commit waits at most
    `adopt_s` for a newer claim of the run to adopt it."""

    succession_s: float = 10.0
    silence_s: float = 30.0
    missing_s: float = 60.0
    adopt_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Seat:
    """One writer's place. `ranks` are the job's, by member; `candidates` the addresses of members 0, 1, ...; `secret` is shared
    by the members, so that nobody else can speak to them."""

    member: int
    ranks: tuple[int, ...]
    candidates: tuple[str, ...]
    secret: bytes
    limits: Limits = Limits()


ALONE = Seat(0, (0,), (), b"")


def new_secret() -> bytes:
    return secrets.token_bytes(16)


def listen(*, host: str | None) -> tuple[socket.socket, str]:
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
    listener.listen(128)
    return not_in_forks(listener), address


def dial(address: str, *, timeout_s: float) -> socket.socket:
    """A connection to a candidate. Raises OSError."""
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
