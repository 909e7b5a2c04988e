"""Which machine this is, as far as sockets and process ids reach."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def host_identity() -> str:
    """Equal for two processes if they share boot, process ids and abstract sockets: same machine, same namespaces."""
    return _identity("net", "pid")


def socket_identity() -> str:
    """Equal for two processes if an abstract socket of one is reached by the other: process ids may be apart."""
    return _identity("net")


def _identity(*kinds: str) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "/".join((socket.gethostname(), boot, *(os.readlink(f"/proc/self/ns/{kind}") for kind in kinds)))
