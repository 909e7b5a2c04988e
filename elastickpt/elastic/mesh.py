"""The sockets between the members of one view: made, ended from another thread, made anew.

Each two members have one stream socket; a message is its number of bytes, then these. What the kernel does not take at once is
sent by a thread. `abort` shuts all sockets down, whatever is under way on them, and each member at the other end of one sees
that. Of one machine they are abstract Unix sockets. Who calls proves a key that the other end told its view. [REC-24]
"""

from __future__ import annotations

import hmac
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b

from elastickpt.elastic.duties import TaskOver
from elastickpt.elastic.links import LinkBroken
from elastickpt.ranks.addresses import dial, listen, not_in_forks
from elastickpt.ranks.threads import apart

_LOOK_S = 0.02  # after so long a member that waits for connections looks whether its view is over
_LENGTH = struct.Struct("<Q")
_HELLO = struct.Struct("<H32s")  # the stage of who calls, and its proof
KEY_NBYTES = 32
_HELD_NBYTES = 4 << 20  # by a socket, or as much of it as the kernel lets


class Outgoing:
    """On its way; `left` is what the kernel has not taken yet."""

    def __init__(self, mesh: ViewSockets, left: list[memoryview]) -> None:
        self._mesh, self.left = mesh, left

    def wait(self) -> None:
        self._mesh.wait_for(self)


class ViewSockets:
    """One socket for each other member, by its stage."""

    def __init__(self, sockets: dict[int, socket.socket]) -> None:
        self._sockets = sockets
        self._changing = threading.Condition()
        self._unsent: dict[int, deque[Outgoing]] = {stage: deque() for stage in sockets}
        self._broken = ""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._sender: threading.Thread | None = None

    def send(self, data: memoryview, stage: int) -> Outgoing:
        message = Outgoing(self, [memoryview(_LENGTH.pack(data.nbytes)), data])
        with self._changing:
            self._require_whole()
            waiting = self._unsent[stage]
            if not waiting:
                self._push(stage, message)
            if message.left:
                waiting.append(message)
                if self._sender is None:
                    self._sender = apart("elastickpt-links", self._send_rest)
                    self._sender.start()
                os.eventfd_write(self._wake, 1)
        return message

    def wait_for(self, message: Outgoing) -> None:
        if message.left:
            with self._changing:
                self._changing.wait_for(lambda: not message.left or self._broken)
                if message.left:
                    self._require_whole()

    def receive(self, data: memoryview, stage: int) -> None:
        length = bytearray(_LENGTH.size)
        self._fill(memoryview(length), stage)
        (announced,) = _LENGTH.unpack(length)
        if announced != data.nbytes:
            raise LinkBroken(f"stage {stage} sends {announced} bytes, and {data.nbytes} are expected")
        self._fill(data, stage)

    def _fill(self, data: memoryview, stage: int) -> None:
        while data.nbytes:
            try:
                found = self._sockets[stage].recv_into(data, 0, socket.MSG_WAITALL)
            except OSError as error:
                raise LinkBroken(f"from stage {stage}: {error}") from error
            if found == 0:
                raise LinkBroken(self._broken or f"stage {stage} closed the connection")
            data = data[found:]

    def abort(self) -> None:
        """From any thread."""
        self._break("these links were ended")

    def close(self) -> None:
        self.abort()
        if self._sender is not None:
            self._sender.join()
        for one in self._sockets.values():
            one.close()
        os.close(self._wake)

    def _require_whole(self) -> None:
        if self._broken:
            raise LinkBroken(self._broken)

    def _break(self, why: str) -> None:
        with self._changing:
            if self._broken:
                return
            self._broken = why
            self._changing.notify_all()
            for one in self._sockets.values():
                with suppress(OSError):  # the other end has closed it
                    one.shutdown(socket.SHUT_RDWR)
            os.eventfd_write(self._wake, 1)

    def _push(self, stage: int, message: Outgoing) -> None:
        """Sends what the kernel takes now."""
        try:
            while message.left:
                sent = self._sockets[stage].sendmsg(message.left, [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                while message.left and sent >= message.left[0].nbytes:
                    sent -= message.left.pop(0).nbytes
                if sent:
                    message.left[0] = message.left[0][sent:]
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkBroken(f"to stage {stage}: {error}") from error

    def _send_rest(self) -> None:
        """The thread that sends what the kernel did not take at once."""
        by_descriptor = {one.fileno(): stage for stage, one in self._sockets.items()}
        while not self._broken:
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            with self._changing:
                for stage, waiting in self._unsent.items():
                    if waiting:
                        poll.register(self._sockets[stage], select.POLLOUT)
            for descriptor, _ in poll.poll():
                if descriptor == self._wake:
                    os.eventfd_read(self._wake)
                else:
                    self._send_more(by_descriptor[descriptor])

    def _send_more(self, stage: int) -> None:
        with self._changing:
            waiting = self._unsent[stage]
            try:
                while waiting and not self._broken:
                    self._push(stage, waiting[0])
                    if waiting[0].left:
                        return
                    waiting.popleft()
            except LinkBroken as error:
                self._break(str(error))
            self._changing.notify_all()


@dataclass(frozen=True, slots=True)
class Entrance:
    """Where one member is called, and the key that whoever calls has to prove."""

    listener: socket.socket
    address: str
    key: bytes


def open_entrance(*, host: str | None) -> Entrance:
    """On this machine only, or at that address."""
    listener, address = listen(host=host)
    listener.setblocking(False)
    return Entrance(listener, address, os.urandom(KEY_NBYTES))


def meet(
    door: Entrance, others: Sequence[tuple[bytes, str]], stage: int, *, limit_s: float, over: Callable[[], bool]
) -> dict[int, socket.socket]:
    """Sockets to all other members, whose keys and addresses are given by stage: each calls those of lower stages, and proves
    that it is of this view. Blocking, for `limit_s` seconds at most. Raises LinkBroken, TaskOver once `over` holds, OSError."""
    sockets: dict[int, socket.socket] = {}
    try:
        for other, (theirs, address) in enumerate(others[:stage]):
            sockets[other] = not_in_forks(dial(address, timeout_s=limit_s))
            sockets[other].sendall(_HELLO.pack(stage, _proof(theirs, stage)))
        sockets |= _admitted(door, set(range(stage + 1, len(others))), limit_s, over)
    except BaseException:
        for one in sockets.values():
            one.close()
        raise
    for one in sockets.values():
        one.settimeout(None)
        if one.family == socket.AF_INET:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:  # which does not grow by itself
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _HELD_NBYTES)
    return sockets


def _admitted(door: Entrance, expected: set[int], limit_s: float, over: Callable[[], bool]) -> dict[int, socket.socket]:
    """Who calls, and proves to be one of those expected, once all have. Strangers are turned away."""
    found: dict[int, socket.socket] = {}
    callers: dict[int, tuple[socket.socket, bytearray]] = {}
    until, poll = time.monotonic() + limit_s, select.poll()
    poll.register(door.listener, select.POLLIN)
    try:
        while missing := expected - found.keys():
            if over():
                raise TaskOver("the view is over")
            if time.monotonic() > until:
                raise LinkBroken(f"stages {sorted(missing)} did not connect within {limit_s:g} s")
            for descriptor, _ in poll.poll(1000 * _LOOK_S):
                if descriptor == door.listener.fileno():
                    caller = not_in_forks(door.listener.accept()[0])
                    caller.setblocking(False)
                    callers[caller.fileno()] = caller, bytearray()
                    poll.register(caller, select.POLLIN)
                    continue
                caller, said = callers[descriptor]
                if (who := _said(caller, said, door.key)) is None:
                    continue
                poll.unregister(caller)
                del callers[descriptor]
                if who in missing - found.keys():
                    found[who] = caller
                else:
                    caller.close()
    except BaseException:
        for caller in found.values():
            caller.close()
        raise
    finally:
        for caller, _ in callers.values():
            caller.close()
    return found


def _said(caller: socket.socket, said: bytearray, key: bytes) -> int | None:
    """The stage of who calls; None while it has not said it, -1 for a stranger."""
    try:
        data = caller.recv(_HELLO.size - len(said))
    except BlockingIOError:
        return None
    except OSError:
        return -1
    said += data
    if len(said) < _HELLO.size:
        return None if data else -1
    stage, proof = _HELLO.unpack(said)
    return stage if hmac.compare_digest(proof, _proof(key, stage)) else -1


def _proof(key: bytes, stage: int) -> bytes:
    return blake2b(stage.to_bytes(2, "little"), key=key, digest_size=32, person=b"elastickpt-link").digest()
