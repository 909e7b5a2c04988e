"""Member 0's end of the star: it lets members in, collects what they say in a round, and tells them what came of it."""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from elastickpt.errors import DeadlineExceeded, RankFailure, RankLost, RanksFailed
from elastickpt.ranks.addresses import Door, KeyValue
from elastickpt.ranks.messages import Connection, Frame, FrameKind, PeerGone, PeerSilent, decode, encode
from elastickpt.ranks.processes import Acquaintances
from elastickpt.ranks.star import Answer, RankFailures, Star, loss
from elastickpt.ranks.team import SILENCE_S, Decide, failure_of

log = logging.getLogger(__name__)

FAR_S = 0.2  # between looks for members on other hosts, while some are missing


@dataclass(slots=True)
class _Answers:
    """What the others have said in one round."""

    name: str
    begins: bool
    begun: float
    payloads: dict[int, bytes] = field(default_factory=dict)
    failures: dict[int, RankFailure] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    met: set[int] = field(default_factory=set)  # whose words from before this call have been gone through

    def has(self, member: int) -> bool:
        return member in self.payloads or member in self.failures


class Hub(Star):
    """See `star.Star`."""

    _door: Door | None = None
    _looked_at = 0.0
    _selector: selectors.BaseSelector | None = None  # within a round

    def __init__(
        self,
        store: Callable[[], KeyValue],
        member: int,
        ranks: tuple[int, ...],
        known: Acquaintances,
        *,
        silence_s: float = SILENCE_S,
    ) -> None:
        super().__init__(store, member, ranks, known, silence_s=silence_s)
        self._peers: dict[int, Connection] = {}
        self._inside: set[int] = set()  # members that have made the call that this one has made
        self._welcomed: set[int] = set()

    def _connections(self) -> list[Connection]:
        return list(self._peers.values())

    def _say_left(self, why: str) -> None:
        failure = RankFailure(self._ranks[0], RankLost.kind, f"gave up: {why}")
        for member, peer in tuple(self._peers.items()):
            if member in self._inside:
                peer.say(Frame(FrameKind.REPORT, 0, encode((failure,))))
            else:
                peer.say(Frame(FrameKind.LEAVE, 0, why.encode(errors="replace")))
            if peer.broken or self._why_ended is not None:
                peer.end()
        self._inside.clear()

    def _close_all(self) -> None:
        for member in tuple(self._peers):
            self._drop(member)
        if self._door is not None:
            self._door.close()
            self._door = None

    def _drop(self, member: int) -> None:
        self._unwatch(member)
        peer = self._peers.pop(member, None)
        self._inside.discard(member)
        self._welcomed.discard(member)
        if peer is not None:
            peer.close()

    # -- making a call -------------------------------------------------------------------------------------------------

    def _arrive(self) -> RankFailures:
        self._begun = time.monotonic()
        self._inside.clear()
        for member, peer in list(self._peers.items()):
            if not peer.hear() or peer.broken:
                while (frame := peer.take()) is not None:
                    self._note_loss(frame)
                self._drop(member)
        report = self._losses()
        if report:
            self._tell_lost(report)
        else:
            if self._door is None:
                self._door = Door(self._store, len(self._ranks), self._processes[0].host)
            for member in list(self._peers):
                self._send(member, Frame(FrameKind.ENTER, self._call.number, b""))
        return report

    def _tell_lost(self, report: Iterable[RankFailure]) -> None:
        for failure in report:
            for peer in self._peers.values():
                peer.say(loss(failure))

    def _admit(self) -> None:
        if self._door is None:
            return
        for hello, peer in self._door.admitted():
            known = self._processes.get(hello.member)
            if not 0 < hello.member < len(self._ranks) or known not in (None, hello.process):
                peer.close()
                continue
            self._drop(hello.member)  # what it had before is of no use to it any more
            self._peers[hello.member] = peer
            self._watch(hello.member)
            self._met(hello.member, hello.process)
            self._send(hello.member, Frame(FrameKind.ENTER, self._call.number, b""))

    # -- a round -------------------------------------------------------------------------------------------------------

    def _exchange(self, name: str, mine: Answer, decide: Decide, *, begins: bool) -> tuple[bytes, RankFailures]:
        answers = _Answers(name, begins, time.monotonic())
        if isinstance(mine, bytes):
            answers.payloads[0] = mine
        else:
            answers.failures[0] = mine
        self._collect(answers)
        replies: Sequence[bytes] = ()
        failures = answers.failures
        if not failures:
            try:
                replies = decide([answers.payloads[member] for member in range(len(self._ranks))])
            except Exception as error:
                failures[0] = failure_of(error, self._ranks[0])
        report = tuple(sorted(failures.values()))
        self._welcome()
        self._reply(replies, report)
        for member in answers.silent:
            self._drop(member)
        self._tell_lost(self._losses() if report else ())
        return (replies[0] if replies else b""), report

    def _welcome(self) -> None:
        """Members learn who the others are, once all are there."""
        if len(self._processes) == len(self._ranks) and len(self._welcomed) < len(self._peers):
            frame = Frame(FrameKind.WELCOME, 0, encode(self._processes))
            for member in self._peers.keys() - self._welcomed:
                self._send(member, frame)
                self._welcomed.add(member)

    def _reply(self, replies: Sequence[bytes], report: RankFailures) -> None:
        data = encode(report) if report else b""
        for member in list(self._peers):
            if member not in self._inside:
                self._send(member, Frame(FrameKind.LEAVE, 0, b"others did not come"))
            elif report:
                self._send(member, Frame(FrameKind.REPORT, 0, data))
            else:
                self._send(member, Frame(FrameKind.VERDICT, 0, replies[member]))

    def _send(self, member: int, frame: Frame) -> None:
        try:
            self._peers[member].send(frame, silence_s=self._silence_s)
        except PeerGone:
            pass  # a member that is gone now learns nothing, and spoils nothing: the decision is made
        except PeerSilent:
            self._peers[member].end()  # nor does one that hangs; it may have got half a frame, and finds the connection closed

    # -- collecting ----------------------------------------------------------------------------------------------------

    def _collect(self, answers: _Answers) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            self._selector = selector
            try:
                if answers.begins and self._door is not None:
                    for listener in self._door.listeners:
                        selector.register(listener, selectors.EVENT_READ)
                for member in self._peers:
                    self._watch(member)
                waiting = set(range(1, len(self._ranks)))
                while not self._complete(waiting, answers):
                    ready = selector.select(timeout=self._pause(waiting, answers))
                    self._require_open()
                    for key, _ in ready:
                        if isinstance(key.data, int):
                            self._pump(key.data, answers)
                    if answers.begins:
                        self._admit()
                        self._look_far()
                    self._look_at_limits(waiting, answers)
            finally:
                self._selector = None

    def _complete(self, waiting: set[int], answers: _Answers) -> bool:
        """Whether the round can end: all have answered; or one is lost, and those that are late need not come any more."""
        for member in tuple(waiting):
            self._hear(member, answers)
            if answers.has(member):
                waiting.discard(member)
                self._unwatch(member)
        lost = any(failure.kind == RankLost.kind for failure in answers.failures.values())
        return not (waiting & self._inside if lost else waiting)

    def _watch(self, member: int) -> None:
        if self._selector is not None:
            self._selector.register(self._peers[member], selectors.EVENT_READ, member)

    def _unwatch(self, member: int) -> None:
        if self._selector is not None and (peer := self._peers.get(member)) is not None:
            with suppress(KeyError):
                self._selector.unregister(peer)

    def _pause(self, waiting: set[int], answers: _Answers) -> float:
        if self._door is not None and self._door.expects:
            return 0.02
        late = any(not answers.has(member) for member in waiting - self._inside)
        tick = self._tick(waits=late)
        return min(FAR_S, tick) if late and len(self._peers) < len(self._ranks) - 1 else tick

    def _look_far(self) -> None:
        """Members on other hosts come in as well, once one of them has asked."""
        now = time.monotonic()
        if self._door is None or len(self._peers) == len(self._ranks) - 1 or now - self._looked_at < FAR_S:
            return
        self._looked_at = now
        if self._door.look_for_far_members() and self._selector is not None:
            self._selector.register(self._door.listeners[-1], selectors.EVENT_READ)

    def _pump(self, member: int, answers: _Answers) -> None:
        peer = self._peers.get(member)
        if peer is None:
            return
        try:
            peer.pump()
        except PeerGone:
            self._hear(member, answers)
            was_inside = member in self._inside
            self._drop(member)
            if was_inside and not answers.has(member):
                answers.failures[member] = self._disconnected(member, f"round {answers.name!r}")

    def _hear(self, member: int, answers: _Answers) -> None:
        """Goes through what a member has said. What it said of an earlier call, and took back, is none of this one."""
        peer = self._peers.get(member)
        if peer is None:
            return
        while not (answers.has(member) and member in answers.met) and (frame := peer.take()) is not None:
            if frame.kind is FrameKind.ENTER:
                if self._passes(member, frame, answers):
                    break
            elif frame.kind is FrameKind.LEAVE:
                if member in self._inside and (member in answers.met or not answers.begins):
                    text = f"gave up: {frame.data.decode(errors='replace')}"
                    answers.failures[member] = RankFailure(self._ranks[member], RankLost.kind, text)
                else:
                    answers.payloads.pop(member, None)
                    answers.failures.pop(member, None)
                self._inside.discard(member)
            elif frame.kind is FrameKind.LOSS:
                self._note_loss(frame)
            elif member in self._inside and frame.kind is FrameKind.PAYLOAD:
                answers.payloads[member] = frame.data
            elif member in self._inside and frame.kind is FrameKind.FAILURE:
                (answers.failures[member],) = decode(frame.data, RankFailures)
            if not answers.begins and answers.has(member):
                break
        answers.met.add(member)

    def _passes(self, member: int, frame: Frame, answers: _Answers) -> bool:
        """A member has made a call. Whether that is one that comes after this one, and so stays for later."""
        mine, its = self._call.number, frame.round
        if not answers.begins or (mine and its > mine):
            self._peers[member].put_back(frame)
            text = f"left this call out, and went on to the next one: {self._call.what}"
            answers.failures[member] = RankFailure(self._ranks[member], RanksFailed.kind, text)
            self._inside.discard(member)
            return True
        if mine and its < mine:
            text = f"came to this call when the other ranks had given it up; rank {self._ranks[0]} makes a later one"
            failure = RankFailure(self._ranks[member], DeadlineExceeded.kind, text)
            self._send(member, Frame(FrameKind.REPORT, 0, encode((failure,))))
            self._send(member, Frame(FrameKind.ENTER, mine, b""))  # it is on its way to this one
            return False
        self._inside.add(member)
        return False

    # -- limits --------------------------------------------------------------------------------------------------------

    def _look_at_limits(self, waiting: set[int], answers: _Answers) -> None:
        now = time.monotonic()
        for member in waiting & self._inside:
            # it may have said nothing while this process itself was busy: count from when we began to listen
            if now - max(self._peers[member].heard_at, answers.begun) > self._silence_s and not answers.has(member):
                answers.failures[member] = self._silent(member, answers.name)
                answers.silent.add(member)
        late = sorted(member for member in waiting - self._inside if not answers.has(member))
        if not late:
            return
        lost = self._losses()
        for failure in lost:
            answers.failures.setdefault(self._ranks.index(failure.rank), failure)
        for member in late:
            if member not in self._peers and self._stays_away(member) and now - answers.begun > self._call.again_s:
                where = f"an earlier round, and it did not come back within {self._call.again_s:g} s"
                answers.failures.setdefault(member, self._disconnected(member, where))
        if now - self._begun > self._call.wait_limit_s:
            answers.failures.update({member: self._too_late(member) for member in late if not answers.has(member)})
        elif self._time_to_log(now):
            log.warning("%s", self._waiting_text([self._ranks[member] for member in late], now))
            for member in self._inside:
                self._peers[member].say(Frame(FrameKind.LATE, 0, encode(late)))

    def _stays_away(self, member: int) -> bool:
        """Whether it was here, and nobody can say from here whether its process lives."""
        return member in self._processes and not self._known.lives_here(self._ranks[member])
