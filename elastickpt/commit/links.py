"""The connections by which the writers of one job decide: where each sits and the candidates for committer listen, a member's
link to the committer, and a candidate's links to the members.

A member's link leads to the first candidate that it reaches: one connection, beaten while something is open. A candidate knows
of each connection whose it is, and about which attempts it spoke.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto

from elastickpt.commit.attempt import Attempt
from elastickpt.errors import InternalError
from elastickpt.ranks.addresses import dial
from elastickpt.ranks.messages import Connection, Frame, FrameKind, Message, PeerGone, PeerSilent, decode, encode
from elastickpt.ranks.threads import Sockets

CANDIDATES = 3  # members 0, 1, ... that may commit an attempt, in this order


@dataclass(frozen=True, slots=True)
class CommitLimits:
    """Seconds. A candidate that cannot be reached for `succession_s`, or that is connected and says nothing for `silence_s`, is
    passed over for the next one, and one that is gone at once; a member that no committer has heard of for `missing_s` is lost.
    A commit waits at most `adopt_s` for a newer claim of the run to adopt it."""

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
    limits: CommitLimits = CommitLimits()


class Introduction(Message, frozen=True):
    """What a member says first on a connection to a candidate."""

    secret: bytes
    member: int


ALONE = Seat(0, (0,), (), b"")


def new_secret() -> bytes:
    return secrets.token_bytes(16)


log = logging.getLogger(__name__)

REDIAL_S = 0.1
DIAL_S = 2.0
FAREWELL_S = 1.0


class LinkChange(Enum):
    STAYED = auto()  # as before
    ARRIVED = auto()  # at another candidate, or at the same by a new connection: all that is open must be said again
    ENDED = auto()  # all candidates were passed over; it begins anew


def say_farewell(seat: Seat) -> None:
    """Tells all candidates that this member's trainer is gone, or its team is, and its writer has nothing left: nothing comes
    of it any more. Blocking, for moments; whom it does not reach waits for the limit."""
    for member, address in enumerate(seat.candidates):
        if member != seat.member:
            with suppress(OSError, PeerGone, PeerSilent):
                link = Connection(dial(address, timeout_s=FAREWELL_S))
                link.send(Frame(FrameKind.HELLO, 0, hello(seat)), silence_s=FAREWELL_S)
                link.send(Frame(FrameKind.FAILURE, 0, b""), silence_s=FAREWELL_S)
                link.close()


def hello(seat: Seat) -> bytes:
    """What a member says first on each connection."""
    return encode(Introduction(seat.secret, seat.member))


class CommitterLink:
    """Belongs to one thread; registers its connection with the sockets, with itself as data."""

    def __init__(self, seat: Seat, sockets: Sockets) -> None:
        self._seat, self._sockets = seat, sockets
        self._at = 0
        self._link: Connection | None = None
        self._unreached_since: float | None = None
        self._dialled_at = -1.0

    @property
    def ends_here(self) -> bool:
        """Whether this member is its own committer."""
        return self._at == self._seat.member

    def go_on(self, now: float) -> LinkChange:
        """One step further, if there is one to go. Dials, at most for `DIAL_S`."""
        if self.ends_here:
            return LinkChange.STAYED
        rank = self._seat.ranks[self._at]
        if self._link is not None:
            if now - self._link.heard_at <= self._seat.limits.silence_s:
                return LinkChange.STAYED
            log.warning("the committer, rank %d, is silent", rank)
            self._unlink()
            return self._pass_over()
        if self._unreached_since is None:
            self._unreached_since = now
        if now - self._dialled_at >= REDIAL_S:
            self._dialled_at = now
            try:
                self._dial()
            except ConnectionRefusedError:  # its trainer and its writer both keep what listens there, as long as they live
                log.warning("the committer, rank %d, is gone", rank)
                return self._pass_over()
            except (OSError, PeerGone, PeerSilent):
                pass
            else:
                self._unreached_since = None
                return LinkChange.ARRIVED
        if now - self._unreached_since >= self._seat.limits.succession_s:
            log.warning("the committer, rank %d, cannot be reached", rank)
            return self._pass_over()
        return LinkChange.STAYED

    def send(self, vote: bytes) -> None:
        """To the committer, if there is a connection; else it is said when there is one."""
        if self._link is None:
            return
        try:
            self._link.send(Frame(FrameKind.PAYLOAD, 0, vote), silence_s=self._seat.limits.silence_s)
        except Exception:  # gone, or it takes nothing: the next step finds another way
            self._unlink()

    def hear(self) -> list[Frame]:
        """The verdicts that came; call when readable."""
        frames: list[Frame] = []
        link = self._link
        if link is None:
            return frames
        try:
            link.pump()
        except Exception:  # gone, or not to be understood: the next step finds another way
            self._unlink()
        while (frame := link.take()) is not None:
            if frame.kind is FrameKind.VERDICT:
                frames.append(frame)
        return frames

    def beat(self) -> None:
        if self._link is not None:
            self._link.beat(0)

    def begin_anew(self) -> None:
        """The next attempt begins with the first candidate."""
        if self._at != 0:
            self._unlink()
        self._at, self._unreached_since = 0, None

    def excuse(self, now: float) -> None:
        """Nobody had a reason to speak until now, or this process stood still."""
        self._unreached_since = None
        if self._link is not None:
            self._link.heard_at = now

    def close(self) -> None:
        self._unlink()

    def _pass_over(self) -> LinkChange:
        self._at += 1
        self._unreached_since = None
        if self._at >= len(self._seat.candidates):
            self._at = 0
            return LinkChange.ENDED
        return LinkChange.ARRIVED if self.ends_here else LinkChange.STAYED

    def _dial(self) -> None:
        """Raises OSError, PeerGone and PeerSilent where nobody is reached: ConnectionRefusedError where nobody listens."""
        link = Connection(dial(self._seat.candidates[self._at], timeout_s=DIAL_S))
        try:
            link.send(Frame(FrameKind.HELLO, 0, hello(self._seat)), silence_s=DIAL_S)
        except BaseException:
            link.close()
            raise
        self._link = link
        self._sockets.register(link, self)

    def _unlink(self) -> None:
        if self._link is not None:
            self._sockets.unregister(self._link)
            self._link.close()
            self._link = None


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

    def __init__(self, seat: Seat, listener: socket.socket | None, sockets: Sockets) -> None:
        self._seat, self._listener, self._sockets = seat, listener, sockets
        self._all: list[MemberLink] = []
        self.departed: set[int] = set()  # members that said farewell
        if listener is not None:
            listener.setblocking(False)
            sockets.register(listener)

    def accept(self) -> None:
        if self._listener is None:
            return
        try:
            sock, _ = self._listener.accept()
        except OSError:
            time.sleep(PAUSE_S)  # it is gone again; or there are no descriptors, and it would be asked at once, and for ever
            return
        link = MemberLink(Connection(sock))
        self._all.append(link)
        self._sockets.register(link.connection, link)

    def read(self, link: MemberLink) -> list[Frame]:
        """The votes that came; marks the client as gone at its end, and drops whoever does not know the secret."""
        try:
            link.connection.pump()
        except Exception:  # gone, or none of ours, whatever it sent
            self._drop(link)
        frames = []
        while (frame := link.connection.take()) is not None:
            if link.member >= 0 and frame.kind is FrameKind.PAYLOAD:
                frames.append(frame)
            elif link.member >= 0 and frame.kind is FrameKind.FAILURE:
                self.departed.add(link.member)
            elif link.member < 0 and frame.kind is FrameKind.HELLO:
                link.member = self._member(frame.data)
                if link.member < 0:
                    self._drop(link)
        return frames

    def send(self, link: MemberLink, frame: Frame) -> None:
        """Blocks at most `SEND_S`; drops a client that takes nothing."""
        if link.gone:
            return
        try:
            link.connection.send(frame, silence_s=SEND_S)
        except Exception:  # whatever it is, the connection is of no use any more
            self._drop(link)

    def beat(self) -> None:
        for link in self._all:
            link.connection.beat(0)

    def silent(self, now: float) -> list[MemberLink]:
        """Those that have something open and said nothing within the limit; they are dropped."""
        limit = self._seat.limits.silence_s
        found = [one for one in self._all if one.attempts and now - one.connection.heard_at > limit]
        for link in found:
            self._drop(link)
        return found

    def excuse(self) -> None:
        """This process stood still, not they."""
        for link in self._all:
            link.connection.heard_at = time.monotonic()

    def has(self, member: int, key: str) -> bool:
        """Whether a connection of that member is there by which it spoke of the attempt."""
        return any(link.member == member and key in link.attempts for link in self._all)

    def that_spoke_of(self, key: str) -> Iterable[MemberLink]:
        """Those who wait for the verdict on the attempt; they are taken to have it."""
        found = [link for link in self._all if key in link.attempts]
        for link in found:
            del link.attempts[key]
        return found

    def close(self) -> None:
        for link in list(self._all):
            self._drop(link)
        if self._listener is not None:
            self._sockets.unregister(self._listener)
            self._listener.close()

    def _member(self, data: bytes) -> int:
        try:
            who = decode(data, Introduction)
        except InternalError:  # a stranger
            return -1
        known = secrets.compare_digest(who.secret, self._seat.secret) and 0 <= who.member < len(self._seat.ranks)
        return who.member if known else -1

    def _drop(self, link: MemberLink) -> None:
        if not link.gone:
            link.gone = True
            self._all.remove(link)
            self._sockets.unregister(link.connection)
            link.connection.close()
