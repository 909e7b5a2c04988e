"""Sockets that a forked process must not keep: by its copies a name, or an address, would outlive its owner."""

from __future__ import annotations

import os
import socket
import weakref

_OURS: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def not_in_forks(held: socket.socket) -> socket.socket:
    """The socket, which is closed in every process that is forked from this one by Python."""
    _OURS.add(held)
    return held


def _forked() -> None:
    for held in list(_OURS):
        held.close()


os.register_at_fork(after_in_child=_forked)
