"""A team over sockets of its own: member 0 is the hub, every other member has one connection to it.

What both ends have in common is here; `hub` has member 0's, `spoke` that of the others. No end holds a thread: one thread says
for all teams of a process that it lives, and ends with the last of them. A team meets by itself as its members make their
calls, and meets again after a connection was lost, so no member counts meetings.

    a call      ENTER, from every member to member 0 and back: "I have made the call". Until then a member is late.
    its rounds  PAYLOAD or FAILURE, then VERDICT or REPORT, with beats meanwhile
    given up    LEAVE: what this member has said of that call does not hold any more
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

from elastickpt.errors import Cancelled, DeadlineExceeded, RankFailure, RankLost, Refused, fault, from_report
from elastickpt.ranks.addresses import KeyValue
from elastickpt.ranks.messages import Connection, Frame, FrameKind, decode, encode
from elastickpt.ranks.processes import Acquaintances, Process, this_process
from elastickpt.ranks.team import BEAT_S, SILENCE_S, Call, Contribute, Decide, failure_of
from elastickpt.ranks.threads import apart

LINGERS_S = 3.0  # after the last round it still looks about by itself, so that a round which begins need not wake it


class Beating(Protocol):
    """A team at work."""

    def beat(self) -> None:
        """Says to its peers that this process lives. Not blocking, from any thread."""
        ...


class Heart:
    """Who is at work, and the thread that beats for them."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Nobody is at work, and there is no thread."""
        self._changed = threading.Condition()
        self._at_work: set[Beating] = set()
        self._teams = 0
        self._thread: threading.Thread | None = None
        self._asleep = False

    def joined(self) -> None:
        """There is one team more."""
        with self._changed:
            self._teams += 1

    def left(self) -> None:
        """A team has ended. With the last one the thread does."""
        with self._changed:
            self._teams -= 1
            self._changed.notify_all()

    @contextmanager
    def at_work(self, team: Beating) -> Iterator[None]:
        """Beats for this team meanwhile."""
        with self._changed:
            self._at_work.add(team)
            if self._thread is None:
                self._thread = apart("elastickpt-beat", self._beat)
                self._thread.start()
            elif self._asleep:
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._at_work.discard(team)

    def _beat(self) -> None:
        worked_at = time.monotonic()
        while True:
            with self._changed:
                if self._teams <= 0 and not self._at_work:
                    self._thread = None
                    return
                self._asleep = not self._at_work and time.monotonic() - worked_at > LINGERS_S
                self._changed.wait(None if self._asleep else BEAT_S)
                self._asleep = False
            if self._beat_once():
                worked_at = time.monotonic()

    def _beat_once(self) -> bool:
        """Whether anybody was at work. Afterwards no team is held here: one that ends must go."""
        with self._changed:
            teams = tuple(self._at_work)
        for team in teams:
            team.beat()
        return bool(teams)


HEART = Heart()


def _forked() -> None:
    HEART.begin()  # a child has none of its parent's threads and teams


os.register_at_fork(after_in_child=_forked)


TICK_S = 0.5  # between looks at limits, and at processes of this host
DYING_S = 1.0  # from the end of a connection until the process behind it begins to end, if it does
ENDING_S = 60.0  # until it is gone then: on a busy machine it may wait for a processor meanwhile
LOG_AFTER_S, LOG_EVERY_S = 10.0, 300.0

Answer = bytes | RankFailure
RankFailures = tuple[RankFailure, ...]


class Star(ABC):
    """One member's end of the star; see `team.Team`. One thread at a time holds rounds; any thread may end it."""

    def __init__(
        self,
        store: Callable[[], KeyValue],
        member: int,
        ranks: tuple[int, ...],
        known: Acquaintances,
        *,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._open_store, self._member, self._ranks, self._known, self._silence_s = store, member, ranks, known, silence_s
        self._processes = {member: this_process()}
        self._call = Call("a round", silence_s)
        self._begins = False
        self._begun = 0.0  # when this member made the call
        self._logged_at = 0.0
        self._why_ended: str | None = None
        self._using, self._ending = threading.Lock(), threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        HEART.joined()
        self._let_go = weakref.finalize(self, _let_go, self._wake)

    @property
    def member(self) -> int:
        return self._member

    @property
    def ranks(self) -> tuple[int, ...]:
        return self._ranks

    @property
    def hosts(self) -> tuple[str, ...]:
        if len(self._processes) < len(self._ranks):
            raise fault("hosts were asked for before the members of a team had met")
        return tuple(self._processes[member].host for member in range(len(self._ranks)))

    @property
    def broken(self) -> bool:
        return bool(self._losses())

    def enter(self, call: Call) -> None:
        self._call, self._begins = call, True

    def round(self, name: str, contribute: Contribute, decide: Decide) -> bytes:
        if not self._using.acquire(blocking=False):
            raise Refused(f"round {name!r}: expected one thread at a time in the rounds of a group, found two")
        begins, self._begins = self._begins, False
        cause: BaseException | None = None
        try:
            self._require_open()
            with HEART.at_work(self):
                report = self._arrive() if begins else ()
                if report:
                    raise from_report(report)
                mine: Answer
                try:
                    mine = contribute()
                except Exception as error:
                    mine, cause = failure_of(error, self._ranks[self._member]), error
                reply, report = self._exchange(name, mine, decide, begins=begins)
        except Exception:
            raise  # a report, or the end of this team
        except BaseException as error:  # KeyboardInterrupt and the like: peers must hear of it now, not at the limit
            self._say_left(_reason(error))
            raise
        finally:
            self._using.release()
            self._close_if_ended()
        if report:
            raise from_report(report) from cause
        return reply

    def leave(self, why: BaseException) -> None:
        if self._why_ended is None:
            self._say_left(_reason(why))

    def end(self, why: str) -> None:
        with self._ending:
            if self._why_ended is None:
                self._why_ended = why
                self._say_left(why)
                os.eventfd_write(self._wake, 1)
        self._close_if_ended()

    def _close_if_ended(self) -> None:
        """Closes what is open, unless a round is held, which does it at its end."""
        if self._why_ended is not None and self._using.acquire(blocking=False):
            try:
                with self._ending:
                    self._close_all()
                    self.__dict__.pop("_store", None)  # its connection ends here, whoever still holds this end
                    self._let_go()
            finally:
                self._using.release()

    def beat(self) -> None:
        for peer in self._connections():
            peer.beat(0)

    @cached_property
    def _store(self) -> KeyValue:
        """Opened when it is needed: it may be gone with a rank that is known to be lost."""
        return self._open_store()

    # -- for both ends -------------------------------------------------------------------------------------------------

    @abstractmethod
    def _connections(self) -> list[Connection]: ...

    @abstractmethod
    def _arrive(self) -> RankFailures:
        """This member has made a call; what is known of others for which nothing can come of it."""

    @abstractmethod
    def _exchange(self, name: str, mine: Answer, decide: Decide, *, begins: bool) -> tuple[bytes, RankFailures]: ...

    @abstractmethod
    def _say_left(self, why: str) -> None:
        """The others wait no longer for this member. Not blocking, from any thread."""

    @abstractmethod
    def _close_all(self) -> None:
        """Closes what this end has open."""

    def _require_open(self) -> None:
        if self._why_ended is not None:
            raise Cancelled(f"{self._call.what}: ended here, as {self._why_ended}")

    def _losses(self, ranks: Iterable[int] | None = None) -> RankFailures:
        return self._known.losses(self._ranks if ranks is None else ranks)

    def _note_loss(self, frame: Frame) -> None:
        """Takes it in, if that is what is said."""
        if frame.kind is FrameKind.LOSS:
            for failure in decode(frame.data, RankFailures):
                self._known.told(failure.rank, failure.message)

    def _met(self, member: int, process: Process) -> None:
        self._processes[member] = process
        self._known.met(self._ranks[member], process)

    def _disconnected(self, member: int, where: str) -> RankFailure:
        """What it means that the connection of a member ended without a word. Waits for the end of a process that is about to
        end, unless this end is ended from another thread meanwhile."""
        rank = self._ranks[member]
        since = time.monotonic()
        while (lives := self._known.lives_here(rank)) and self._why_ended is None:
            if time.monotonic() - since > (ENDING_S if self._known.ends_here(rank) else DYING_S):
                break
            time.sleep(0.005)
        if not lives and (gone := self._losses([rank])):  # asked after it: a process may end between two looks
            return RankFailure(rank, RankLost.kind, f"{gone[0].message} in {where}")
        at = time.strftime("%H:%M:%S UTC", time.gmtime())
        return RankFailure(rank, RankLost.kind, f"its connection was lost in {where} at {at}; its process may be gone")

    def _silent(self, member: int, name: str) -> RankFailure:
        text = f"did not answer in round {name!r} and sent nothing for {self._silence_s:g} s"
        return RankFailure(self._ranks[member], DeadlineExceeded.kind, text)

    def _too_late(self, member: int) -> RankFailure:
        call = self._call
        within = f"within {call.wait_limit_s:g} s ({call.limit_name})"
        text = f"did not come to the {call.what} {within}; {self._everybody} must call it"
        return RankFailure(self._ranks[member], DeadlineExceeded.kind, text)

    @property
    def _everybody(self) -> str:
        return f"every rank of {name_ranks(self._ranks)}"

    def _tick(self, *, waits: bool) -> float:
        """For how long this end listens before it looks at its limits; `waits` for somebody who is late."""
        left = self._begun + self._call.wait_limit_s - time.monotonic() if waits else TICK_S
        return max(0.005, min(TICK_S, self._silence_s / 4, left))

    def _time_to_log(self, now: float) -> bool:
        """Whether it is said now for whom this member waits: after 10 s, and each time that the wait has doubled."""
        waited = now - self._begun
        due = LOG_AFTER_S if self._logged_at <= self._begun else min(2 * (self._logged_at - self._begun), LOG_EVERY_S + waited)
        if waited < due:
            return False
        self._logged_at = now
        return True

    def _waiting_text(self, ranks: Sequence[int], now: float) -> str:
        call = self._call
        return (
            f"{call.what}: waiting for {name_ranks(ranks)} since {now - self._begun:.0f} s, of at most {call.wait_limit_s:g} s "
            f"({call.limit_name}); {self._everybody} must call it"
        )


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 1, 2`, of many the first ones."""
    shown = ", ".join(str(rank) for rank in ranks[:16])
    more = f" and {len(ranks) - 16} more" if len(ranks) > 16 else ""
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{more}"


def loss(failure: RankFailure) -> Frame:
    """Tells of a rank whose process is certainly gone."""
    return Frame(FrameKind.LOSS, 0, encode((failure,)))


def _reason(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _let_go(wake: int) -> None:
    os.close(wake)
    HEART.left()
