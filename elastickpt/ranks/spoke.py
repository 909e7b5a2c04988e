"""The end of the star that every member but member 0 has: it finds member 0, says what it has to, and waits for the reply."""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Iterator
from contextlib import suppress

from elastickpt.errors import DeadlineExceeded, RankFailure, RankLost
from elastickpt.ranks.addresses import FAR, HUB, Address, Hello, call_at
from elastickpt.ranks.messages import Connection, Frame, FrameKind, PeerGone, PeerSilent, decode, encode
from elastickpt.ranks.processes import Process
from elastickpt.ranks.star import Answer, RankFailures, Star, loss
from elastickpt.ranks.team import Decide

log = logging.getLogger(__name__)

LOOK_S = (0.005, 0.2)  # between looks for member 0: the first, and what they grow to
ANSWERS_S = 5.0


class _Moved(Exception):
    """Member 0 is somewhere else than where this member has called."""


class Spoke(Star):
    """See `star.Star`."""

    _hub: Connection | None = None
    _address: Address | None = None
    _left_word = False  # that this member has come, for others who find no member 0
    _hub_inside = False  # member 0 has made the call that this member has made

    def _connections(self) -> list[Connection]:
        return [] if self._hub is None else [self._hub]

    def _say_left(self, why: str) -> None:
        hub = self._hub
        if hub is None:
            return
        hub.say(Frame(FrameKind.LEAVE, 0, why.encode(errors="replace")))
        if hub.broken or self._why_ended is not None:
            hub.end()

    def _close_all(self) -> None:
        self._drop_hub()

    def _drop_hub(self) -> None:
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.close()

    # -- making a call -------------------------------------------------------------------------------------------------

    def _arrive(self) -> RankFailures:
        self._begun = time.monotonic()
        self._hub_inside = False
        hub = self._hub
        if hub is not None:
            stands = hub.hear() and not hub.broken
            for frame in _taken(hub):  # replies among them are to calls that this member has given up
                self._note(frame)
            if not stands:
                self._drop_hub()
        report = self._lost()
        if not report and self._hub is None:
            report = self._find_hub()
        if not report:
            self._enter()
        return report

    def _enter(self) -> None:
        if self._hub is not None:
            with suppress(PeerGone, PeerSilent):  # found out when the round is held
                self._hub.send(Frame(FrameKind.ENTER, self._call.number, b""), silence_s=self._silence_s)

    def _lost(self) -> RankFailures:
        """Ranks that are certainly gone, which member 0 may not know from where it is."""
        report = self._losses()
        if self._hub is not None:
            for failure in report:
                self._hub.say(loss(failure))
        return report

    def _find_hub(self) -> RankFailures:
        """Connects to member 0; blocking until it has made a call of this team once."""
        pause, failing_since = LOOK_S[0], 0.0
        while True:
            self._require_open()
            try:
                if self._connects():
                    return ()
                failing_since = 0.0
            except DeadlineExceeded:  # no store: it is gone, perhaps with a rank whose end will be seen in a moment
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > min(self._call.again_s, self._call.wait_limit_s) and not self._lost():
                    raise
            report = self._lost() or (() if failing_since else self._limit(nobody=self._address is None))
            if report:
                return report
            self._pause(pause)
            pause = min(1.5 * pause, LOOK_S[1])

    def _connects(self) -> bool:
        """One try to get a connection to member 0."""
        me, address = self._processes[self._member], self._read_address()
        if address is None:
            if not self._left_word:
                self._left_word = True
                self._store.set(f"here/{self._member}", b"")
        elif address.host != me.host and not address.far:
            self._store.set(FAR, b"")
        else:
            with suppress(OSError):  # nobody is there; or it is the address of an earlier life of this job, not overwritten yet
                self._hub, self._address = call_at(address, Hello(address.secret, self._member, me)), address
                return True
        return False

    def _read_address(self) -> Address | None:
        return decode(self._store.get(HUB, timeout_s=ANSWERS_S), Address) if self._store.has(HUB) else None

    def _pause(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            selector.select(timeout=seconds)

    def _limit(self, nobody: bool) -> RankFailures:
        """Says for whom this member waits, while member 0 has not made the call; what to report once that is over."""
        now = time.monotonic()
        waited = now - self._begun
        met = 0 in self._processes and not self._known.lives_here(self._ranks[0])
        if met and self._hub is None and waited > self._call.again_s:
            return (self._disconnected(0, f"an earlier round, and it did not come back within {self._call.again_s:g} s"),)
        if waited > self._call.wait_limit_s:
            return tuple(self._too_late(member) for member in self._missing(nobody))
        if self._time_to_log(now):
            log.warning("%s", self._waiting_text([self._ranks[member] for member in self._missing(nobody)], now))
        return ()

    def _missing(self, nobody: bool) -> list[int]:
        """Members that have not made the call, as far as this one can know: until member 0 made one, all leave a word."""
        others = [member for member in range(1, len(self._ranks)) if member != self._member] if nobody else []
        return [0, *(member for member in others if not self._store.has(f"here/{member}"))]

    # -- a round -------------------------------------------------------------------------------------------------------

    def _exchange(self, name: str, mine: Answer, decide: Decide, *, begins: bool) -> tuple[bytes, RankFailures]:
        kind, data = (FrameKind.PAYLOAD, mine) if isinstance(mine, bytes) else (FrameKind.FAILURE, encode((mine,)))
        own = (mine,) if isinstance(mine, RankFailure) else ()
        while True:
            hub = self._hub
            if hub is None:
                return b"", (*own, self._disconnected(0, f"round {name!r}"))
            try:
                hub.send(Frame(kind, 0, data), silence_s=self._silence_s)
                return self._await_hub(hub, name, own, begins=begins)
            except PeerGone:
                self._require_open()
                if report := self._last_words(hub, begins=begins):
                    return b"", report
                if not (begins and not self._hub_inside and self._known.lives_here(self._ranks[0])):
                    return b"", (*own, self._disconnected(0, f"round {name!r}"))
                if report := self._find_hub():  # it hung up on an earlier call
                    return b"", (*own, *report)
                self._enter()
            except PeerSilent:
                self._say_left(f"it heard nothing from rank {self._ranks[0]} for {self._silence_s:g} s in round {name!r}")
                self._drop_hub()
                return b"", (*own, self._silent(0, name))
            except _Moved:
                self._drop_hub()
                if report := self._find_hub():
                    return b"", report
                self._enter()

    def _last_words(self, hub: Connection, *, begins: bool) -> RankFailures:
        """The report of a member 0 that has hung up: a member that hung for too long finds out here."""
        hub.hear()
        report: RankFailures = ()
        for frame in _taken(hub):
            if frame.kind is FrameKind.REPORT and (self._hub_inside or not begins):
                report = decode(frame.data, RankFailures)
            self._note(frame)
        self._drop_hub()
        return report

    def _await_hub(self, hub: Connection, name: str, own: RankFailures, *, begins: bool) -> tuple[bytes, RankFailures]:
        hub.heard_at = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(hub, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                for frame in _taken(hub):
                    if frame.kind is FrameKind.LEAVE and not begins:
                        text = f"gave up in round {name!r}: {frame.data.decode(errors='replace')}"
                        return b"", (*own, RankFailure(self._ranks[0], RankLost.kind, text))
                    if frame.kind in (FrameKind.VERDICT, FrameKind.REPORT) and (self._hub_inside or not begins):
                        return (frame.data, ()) if frame.kind is FrameKind.VERDICT else (b"", decode(frame.data, RankFailures))
                    self._note(frame)
                    if frame.kind is FrameKind.LOSS:
                        return b"", (*own, *self._losses())
                self._require_open()
                if selector.select(timeout=self._tick(waits=begins and not self._hub_inside)):
                    self._require_open()
                    hub.pump()
                elif begins and not self._hub_inside:
                    report = self._lost() or self._limit(nobody=False)
                    if report:
                        self._say_left("; ".join(f"rank {failure.rank} {failure.message}" for failure in report))
                        return b"", (*own, *report)
                    if 0 not in self._processes and self._read_address() != self._address:
                        raise _Moved
                elif time.monotonic() - hub.heard_at > self._silence_s:
                    raise PeerSilent

    def _note(self, frame: Frame) -> None:
        """What is said beside a reply."""
        if frame.kind is FrameKind.ENTER:
            self._hub_inside = True
            if self._hub is not None:
                self._hub.heard_at = time.monotonic()
        elif frame.kind is FrameKind.LEAVE:
            self._hub_inside = False
        elif frame.kind is FrameKind.LOSS:
            self._note_loss(frame)
        elif frame.kind is FrameKind.WELCOME:
            for member, process in decode(frame.data, dict[int, Process]).items():
                self._met(member, process)
        elif frame.kind is FrameKind.LATE:
            late = [self._ranks[member] for member in decode(frame.data, list[int])]
            log.warning("%s", self._waiting_text(late, time.monotonic()))


def _taken(hub: Connection) -> Iterator[Frame]:
    while (frame := hub.take()) is not None:
        yield frame
