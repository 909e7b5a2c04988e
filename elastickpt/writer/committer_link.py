"""A member's way to the committer: the first candidate that it reaches; one connection, beaten while something is open."""

from __future__ import annotations

import logging
import selectors
from contextlib import suppress
from enum import Enum, auto

from elastickpt.ranks.addresses import dial
from elastickpt.ranks.messages import Connection, Frame, Kind, PeerGone, PeerSilent, encode
from elastickpt.writer.seats import Introduction, Seat

log = logging.getLogger(__name__)

REDIAL_S = 0.1
DIAL_S = 2.0
FAREWELL_S = 1.0


class Step(Enum):
    STAYED = auto()  # as before
    ARRIVED = auto()  # at another candidate, or at the same by a new connection: all that is open must be said again
    ENDED = auto()  # all candidates were passed over; it begins anew


def say_farewell(seat: Seat) -> None:
    """Tells all candidates that this member's trainer is gone and its writer has nothing left: nothing comes of it any more.
    Blocking, for moments; whom it does not reach waits for the limit."""
    for member, address in enumerate(seat.candidates):
        if member != seat.member:
            with suppress(OSError, PeerGone, PeerSilent):
                link = Connection(dial(address, timeout_s=FAREWELL_S))
                link.send(Frame(Kind.HELLO, 0, hello(seat)), silence_s=FAREWELL_S)
                link.send(Frame(Kind.FAILURE, 0, b""), silence_s=FAREWELL_S)
                link.close()


def hello(seat: Seat) -> bytes:
    """What a member says first on each connection."""
    return encode(Introduction(seat.secret, seat.member))


class CommitterLink:
    """Belongs to one thread; registers its connection with the selector, with itself as data."""

    def __init__(self, seat: Seat, selector: selectors.BaseSelector) -> None:
        self._seat, self._selector = seat, selector
        self._at = 0
        self._link: Connection | None = None
        self._unreached_since: float | None = None
        self._dialled_at = -1.0

    @property
    def ends_here(self) -> bool:
        """Whether this member is its own committer."""
        return self._at == self._seat.member

    def go_on(self, now: float) -> Step:
        """One step further, if there is one to go. Dials, at most for `DIAL_S`."""
        if self.ends_here:
            return Step.STAYED
        rank = self._seat.ranks[self._at]
        if self._link is not None:
            if now - self._link.heard_at <= self._seat.limits.silence_s:
                return Step.STAYED
            log.warning("the committer, rank %d, is silent", rank)
            self._unlink()
            return self._pass_over()
        if self._unreached_since is None:
            self._unreached_since = now
        if now - self._dialled_at >= REDIAL_S:
            self._dialled_at = now
            if self._dial():
                self._unreached_since = None
                return Step.ARRIVED
        if now - self._unreached_since >= self._seat.limits.succession_s:
            log.warning("the committer, rank %d, cannot be reached", rank)
            return self._pass_over()
        return Step.STAYED

    def send(self, vote: bytes) -> None:
        """To the committer, if there is a connection; else it is said when there is one."""
        if self._link is None:
            return
        try:
            self._link.send(Frame(Kind.PAYLOAD, 0, vote), silence_s=self._seat.limits.silence_s)
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
            if frame.kind is Kind.VERDICT:
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

    def _pass_over(self) -> Step:
        self._at += 1
        self._unreached_since = None
        if self._at >= len(self._seat.candidates):
            self._at = 0
            return Step.ENDED
        return Step.ARRIVED if self.ends_here else Step.STAYED

    def _dial(self) -> bool:
        try:
            link = Connection(dial(self._seat.candidates[self._at], timeout_s=DIAL_S))
        except OSError:
            return False
        try:
            link.send(Frame(Kind.HELLO, 0, hello(self._seat)), silence_s=DIAL_S)
        except Exception:  # as good as not reached
            link.close()
            return False
        self._link = link
        self._selector.register(link, selectors.EVENT_READ, self)
        return True

    def _unlink(self) -> None:
        if self._link is not None:
            self._selector.unregister(self._link)
            self._link.close()
            self._link = None
