"""The other writers as a candidate for committer sees them: who is connected, as which member, about which attempts."""

from __future__ import annotations

import secrets
import selectors
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from elastickpt.commit.attempt import Attempt
from elastickpt.errors import InternalError
from elastickpt.ranks.messages import Connection, Frame, Kind, decode
from elastickpt.writer.seats import Introduction, Seat

PAUSE_S = 0.05
SEND_S = 5.0  # what a client that takes nothing is waited for; it comes back by itself


@dataclass(slots=True, eq=False)
class MemberLink:
    """One connection; `member` is -1 until it has said hello. `attempts` are the attempts that it spoke of, by key."""

    connection: Connection
    member: int = -1
    gone: bool = False
    attempts: dict[str, Attempt] = field(default_factory=dict)


class MemberLinks:
    """All connections to one candidate. Belongs to one thread."""

    def __init__(self, seat: Seat, listener: socket.socket | None, selector: selectors.BaseSelector) -> None:
        self._seat, self._listener, self._selector = seat, listener, selector
        self._all: list[MemberLink] = []
        self.departed: set[int] = set()  # members that said farewell
        if listener is not None:
            listener.setblocking(False)
            selector.register(listener, selectors.EVENT_READ)

    def accept(self) -> None:
        if self._listener is None:
            return
        try:
            sock, _ = self._listener.accept()
        except OSError:
            time.sleep(PAUSE_S)  # it is gone again; or there are no descriptors, and it would be asked at once, and for ever
            return
        client = MemberLink(Connection(sock))
        self._all.append(client)
        self._selector.register(client.connection, selectors.EVENT_READ, client)

    def read(self, client: MemberLink) -> list[Frame]:
        """The votes that came; marks the client as gone at its end, and drops whoever does not know the secret."""
        try:
            client.connection.pump()
        except Exception:  # gone, or none of ours, whatever it sent
            self._drop(client)
        frames = []
        while (frame := client.connection.take()) is not None:
            if client.member >= 0 and frame.kind is Kind.PAYLOAD:
                frames.append(frame)
            elif client.member >= 0 and frame.kind is Kind.FAILURE:
                self.departed.add(client.member)
            elif client.member < 0 and frame.kind is Kind.HELLO:
                client.member = self._member(frame.data)
                if client.member < 0:
                    self._drop(client)
        return frames

    def send(self, client: MemberLink, frame: Frame) -> None:
        """Blocks at most `SEND_S`; drops a client that takes nothing."""
        if client.gone:
            return
        try:
            client.connection.send(frame, silence_s=SEND_S)
        except Exception:  # whatever it is, the connection is of no use any more
            self._drop(client)

    def beat(self) -> None:
        for client in self._all:
            client.connection.beat(0)

    def silent(self, now: float) -> list[MemberLink]:
        """Those that have something open and said nothing within the limit; they are dropped."""
        limit = self._seat.limits.silence_s
        found = [one for one in self._all if one.attempts and now - one.connection.heard_at > limit]
        for client in found:
            self._drop(client)
        return found

    def excuse(self) -> None:
        """This process stood still, not they."""
        for client in self._all:
            client.connection.heard_at = time.monotonic()

    def has(self, member: int, key: str) -> bool:
        """Whether a connection of that member is there by which it spoke of the attempt."""
        return any(client.member == member and key in client.attempts for client in self._all)

    def that_spoke_of(self, key: str) -> Iterable[MemberLink]:
        """Those who wait for the verdict on the attempt; they are taken to have it."""
        found = [client for client in self._all if key in client.attempts]
        for client in found:
            del client.attempts[key]
        return found

    def close(self) -> None:
        for client in list(self._all):
            self._drop(client)
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()

    def _member(self, data: bytes) -> int:
        try:
            who = decode(data, Introduction)
        except InternalError:  # a stranger
            return -1
        known = secrets.compare_digest(who.secret, self._seat.secret) and 0 <= who.member < len(self._seat.ranks)
        return who.member if known else -1

    def _drop(self, client: MemberLink) -> None:
        if not client.gone:
            client.gone = True
            self._all.remove(client)
            self._selector.unregister(client.connection)
            client.connection.close()
