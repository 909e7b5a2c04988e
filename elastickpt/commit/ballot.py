"""The writers of a job decide their attempts among themselves: one member's part, in a thread of its own. [SAVE-80..90]

    a member                                               the committer
    enrolls an attempt, says so         -- vote -->        counts it as present
    attests, or fails, says so          -- vote -->        its tally says what is next: finish, abort, look
    hears the verdict                   <- verdict --      to all that spoke of the attempt, and to all that ask later

1. The committer is the first candidate that a member reaches. One that is gone, that cannot be reached for `succession_s`, or
   that is silent for `silence_s`, is passed over for the next; after the last a member gives the attempt up by itself
   (`outcome.give_up`).
2. A candidate acts only while it is its own committer. As a member it passes on the verdicts that it hears.
3. Attempts are decided one after the other, in the order in which this member enrolled them.
4. Two committers at once are no harm: the attempt's register, or the name of its path, decides (`outcome.py`).
5. A member that lost its connection says everything open again. Nothing here is remembered by a writer that is revived: its
   trainer tells it again, and what was decided is found where it is decided.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from elastickpt.commit.attempt import Attempt, Verdict, WriterSaid, decode_verdict, decode_vote, encode_verdict, encode_vote
from elastickpt.commit.attest import DraftContents
from elastickpt.commit.committer import CommitNow, CommitThread, GiveUp, LookFor, Tally
from elastickpt.commit.links import CommitterLink, LinkChange, MemberLink, MemberLinks, Seat
from elastickpt.commit.outcome import Patience
from elastickpt.errors import RankFailure, RankLost, WriterLost
from elastickpt.format.records import FileDigest
from elastickpt.ranks.messages import Frame, FrameKind
from elastickpt.ranks.team import BEAT_S
from elastickpt.ranks.threads import Actor
from elastickpt.storage.store import Store

log = logging.getLogger(__name__)

KNOWN_VERDICTS = 64
TURN_S = 0.25
RECOVER_S = 0.1

ReadContents = Callable[[], DraftContents | None]
TellVerdict = Callable[[str, Verdict], None]


@dataclass(slots=True, eq=False)
class _Open:
    """An attempt that this member enrolled and that is not decided."""

    attempt: Attempt
    contents: ReadContents
    said: WriterSaid = None
    given_up: bool = False  # by this member itself, which then hears what became of it


class CommitBallot:
    """One writer's part. Methods do not block and may come from any thread; `tell` is called from the ballot's thread."""

    def __init__(
        self,
        seat: Seat,
        listener: socket.socket | None,
        stores: Callable[[str], Store],
        tell: TellVerdict,
        *,
        patience: Patience | None = None,
    ) -> None:
        self._seat, self._tell = seat, tell
        self._actor = Actor("elastickpt-ballot", self._run)
        self._member_links = MemberLinks(seat, listener, self._actor.sockets)
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._tallies: dict[str, Tally] = {}
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()
        self._strangers: dict[str, tuple[Attempt, float]] = {}
        self._turned_at = time.monotonic()
        self._committer_link = CommitterLink(seat, self._actor.sockets)
        self._beaten_at = 0.0
        rank = seat.ranks[seat.member]
        self._commit_thread = CommitThread(rank, stores, patience or Patience(), self._leave, self._decided)
        self._closed = False
        self._actor.start()

    def enroll(self, attempt: Attempt, contents: ReadContents) -> None:
        """This writer takes part in the attempt from now on. `contents` is called if it commits, by another thread."""
        self._leave(lambda: self._enroll(attempt, contents))

    def say(self, key: str, what: FileDigest | RankFailure) -> None:
        """This writer's last word on an attempt that it enrolled."""
        self._leave(lambda: self._say(key, what))

    def find_out(self, key: str) -> None:
        """Looks whether an attempt that it enrolled is decided already: the others need not say anything of it again."""
        self._leave(lambda: self._find_out(key))

    def settle(self, key: str, why: RankFailure) -> None:
        """Waits for nobody any more: an attempt that is open is found committed, or aborted."""
        self._leave(lambda: self._settle(key, why))

    def settled(self, key: str) -> bool:
        """Whether the attempt is decided, as far as is known here: nothing needs to be written for it any more."""
        return key in self._verdicts

    def join(self, limit_s: float) -> bool:
        """Whether all attempts were decided within the limit. Blocking."""
        return self._actor.idle_within(limit_s)

    def close(self) -> None:
        """Takes no part any more; what is open stays open."""
        self._closed = True
        self._leave(lambda: None)

    # -- everything below runs in the ballot's thread ----------------------------------------------------------------

    def _leave(self, command: Callable[[], None]) -> None:
        self._actor.leave(command)  # after the end nobody takes part any more

    def _run(self) -> None:
        while not self._closed:
            try:
                self._turn()
            except Exception:
                log.exception("a turn of the ballot failed")
                time.sleep(RECOVER_S)
        self._member_links.close()
        self._committer_link.close()
        self._commit_thread.stop()
        self._actor.end()

    def _turn(self) -> None:
        for key in self._actor.wait(TURN_S if self._open or self._tallies else None):
            if isinstance(key.data, MemberLink):
                self._hear_member(key.data)
            elif isinstance(key.data, CommitterLink):
                for frame in self._committer_link.hear():
                    self._decided(*decode_verdict(frame.data))
            else:
                self._member_links.accept()
        self._actor.carry_out()
        now = time.monotonic()
        self._excuse(now)
        self._reach(now)
        self._beat(now)
        self._take_in(now)
        self._act(now)
        if not self._open:
            self._committer_link.begin_anew()
            self._actor.rest()

    def _excuse(self, now: float) -> None:
        """Silence counts only while this process was listening and had something open, so that the others beat."""
        idle = not self._open and not self._tallies
        if idle or now - self._turned_at > self._seat.limits.silence_s / 2:
            self._member_links.excuse()
            self._committer_link.excuse(now)
        self._turned_at = now

    def _enroll(self, attempt: Attempt, contents: ReadContents) -> None:
        self._strangers.pop(attempt.id, None)
        if attempt.id in self._open:
            return
        if (verdict := self._verdicts.get(attempt.id)) is not None:  # told again by a trainer that had not heard
            self._tell(attempt.id, verdict)
            return
        if not self._open:
            self._committer_link.excuse(time.monotonic())
        entry = _Open(attempt, contents)
        self._open[attempt.id] = entry
        self._speak(entry)

    def _say(self, key: str, what: FileDigest | RankFailure) -> None:
        entry = self._open.get(key)
        if entry is not None and entry.said is None:
            entry.said = what
            self._speak(entry)

    def _find_out(self, key: str) -> None:
        entry = self._open.get(key)
        if entry is None or not self._committer_link.ends_here:  # the committer answers the others
            return
        lost = RankFailure(self._seat.ranks[self._seat.member], WriterLost.kind, "ended with why the attempt was aborted")
        self._commit_thread.find_out(entry.attempt, (lost,))

    def _settle(self, key: str, why: RankFailure) -> None:
        if (entry := self._open.get(key)) is not None:
            self._commit_thread.give_up(entry.attempt, (why,))

    def _speak(self, entry: _Open) -> None:
        """Says to the committer of now what is to be said of the attempt."""
        if self._committer_link.ends_here:
            self._count(self._seat.member, entry.attempt, entry.said)
        else:
            self._committer_link.send(encode_vote(entry.attempt, entry.said))

    # -- the member ----------------------------------------------------------------------------------------------------

    def _reach(self, now: float) -> None:
        match self._committer_link.go_on(now) if self._open else LinkChange.STAYED:
            case LinkChange.ARRIVED:
                for entry in list(self._open.values()):
                    self._speak(entry)
            case LinkChange.ENDED:
                report = (RankFailure(self._seat.ranks[0], RankLost.kind, "no writer that could commit was reached"),)
                for entry in (one for one in self._open.values() if not one.given_up):
                    entry.given_up = True
                    self._commit_thread.give_up(entry.attempt, report)
            case _:
                pass

    def _beat(self, now: float) -> None:
        if now - self._beaten_at >= BEAT_S / 2:
            self._beaten_at = now
            self._committer_link.beat()
            self._member_links.beat()

    # -- the committer -------------------------------------------------------------------------------------------------

    def _hear_member(self, link: MemberLink) -> None:
        for frame in self._member_links.read(link):
            attempt, said = decode_vote(frame.data)
            if (verdict := self._verdicts.get(attempt.id)) is not None:
                self._member_links.send(link, Frame(FrameKind.VERDICT, 0, encode_verdict(attempt.id, verdict)))
            else:
                link.attempts[attempt.id] = attempt
                self._count(link.member, attempt, said)
        if link.gone:
            self._lost(link, time.monotonic())

    def _lost(self, link: MemberLink, now: float) -> None:
        """Nothing is heard by this connection any more; its member may have another one by now."""
        for key in link.attempts:
            if key in self._tallies and not self._member_links.has(link.member, key):
                self._tallies[key].lost(link.member, now=now)

    def _count(self, member: int, attempt: Attempt, said: WriterSaid) -> None:
        tally = self._tallies.get(attempt.id)
        if tally is None:
            now = time.monotonic()
            tally = self._tallies[attempt.id] = Tally(self._seat.ranks, now=now)
            if attempt.id not in self._open:
                self._strangers[attempt.id] = (attempt, now)
        tally.present(member)
        if said is not None:
            tally.said(member, said)

    def _take_in(self, now: float) -> None:
        """Attempts that others spoke of and that this member's trainer never told it of: they wait for a verdict."""
        for key, (attempt, since) in list(self._strangers.items()):
            if now - since >= self._seat.limits.missing_s:
                rank = self._seat.ranks[self._seat.member]
                self._enroll(attempt, lambda: None)
                self._say(key, RankFailure(rank, RankLost.kind, "its trainer is gone, and had not staged it"))

    def _act(self, now: float) -> None:
        """The next thing for the first attempt that this member enrolled, if it is the committer."""
        for link in self._member_links.silent(now):
            self._lost(link, now)
        if self._commit_thread.at_work or not self._committer_link.ends_here or not self._open:
            return
        entry = next(iter(self._open.values()))
        tally = self._tallies.get(entry.attempt.id)
        if tally is None:
            return
        tally.passed_over([*range(self._seat.member), *self._member_links.departed])
        match tally.next(now=now, missing_s=self._seat.limits.missing_s):
            case CommitNow(files):
                self._commit_thread.commit(entry.attempt, entry.contents, files)
            case GiveUp(report):
                self._commit_thread.give_up(entry.attempt, report)
            case LookFor(members):
                self._commit_thread.look_for(entry.attempt, members, lambda found: self._looked_for(entry.attempt.id, found))
            case _:
                pass

    def _looked_for(self, key: str, found: Mapping[int, FileDigest | None]) -> None:
        if (tally := self._tallies.get(key)) is not None:
            for member, file in found.items():
                tally.said(member, file) if file is not None else tally.not_found(member)

    def _decided(self, key: str, verdict: Verdict) -> None:
        if key in self._verdicts:
            return
        self._verdicts[key] = verdict
        while len(self._verdicts) > KNOWN_VERDICTS:
            self._verdicts.popitem(last=False)
        self._tallies.pop(key, None)
        self._strangers.pop(key, None)
        for link in self._member_links.that_spoke_of(key):
            self._member_links.send(link, Frame(FrameKind.VERDICT, 0, encode_verdict(key, verdict)))
        entry = self._open.pop(key, None)
        if entry is not None:
            self._tell(key, verdict)
