"""When the job is going to be ended: what is noticed, and at which step everybody saves for the last time. [RUN-94..97]

Each rank notices for itself: SIGTERM, which launchers send to all; SIGUSR1, which SLURM sends before a job's time is over; or
what a watcher of spot notices gives. It reaches rank 0, which decides for a later step and publishes that before any rank can
complete the step, as for saves by clock.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isfinite
from types import FrameType, MappingProxyType

from elastickpt.errors import Refused
from elastickpt.runs.due import LEAD_STEPS

log = logging.getLogger(__name__)

DEADLINE_S = 30.0  # what launchers wait, by default, between SIGTERM and SIGKILL
SIGNALS = MappingProxyType({signal.SIGTERM: DEADLINE_S, signal.SIGUSR1: DEADLINE_S})
MARGIN = 1.25  # on measured times, in which a last save must fit


@dataclass(frozen=True, slots=True)
class Notice:
    """This process is going to be ended. `source` is a signal's name or the watcher's word; both times are of
    `time.monotonic`, in seconds: when it came, and by when the process must have ended."""

    source: str
    came_s: float
    deadline_s: float

    def left_s(self, now_s: float) -> float:
        """Seconds until the deadline; what ranks tell each other, as their clocks differ."""
        return max(0.0, self.deadline_s - now_s)


class Notices:
    """What this process has been told about its end, from now on until `close()`.

    `signals` maps each one to the seconds between it and the end (SLURM's `--signal=USR1@60` means 60).
    Handlers of the signals only note it, and call the handler that was there before if that was a function. A process forked
    from this one has the signals as they were. With signals made and closed by the main thread, else Refused; so is a signal
    whose handler Python does not know.
    """

    def __init__(self, signals: Mapping[signal.Signals, float] = SIGNALS) -> None:
        for one, deadline_s in signals.items():
            if not (isfinite(deadline_s) and deadline_s > 0):
                raise Refused(f"{one.name}: {deadline_s!r}: expected seconds above 0")
        if signals and threading.current_thread() is not threading.main_thread():
            raise Refused("handlers of signals can only be set by the main thread")
        unknown = [one.name for one in signals if signal.getsignal(one) is None]
        if unknown:
            raise Refused(f"{', '.join(unknown)}: handled by what Python does not know and could not put back")
        self._deadlines_s = dict(signals)
        self._process = os.getpid()
        self._given: dict[str, Notice] = {}
        self._before = {one: signal.getsignal(one) for one in signals}
        for one in signals:
            signal.signal(one, self._handle)

    @property
    def notice(self) -> Notice | None:
        """The one with the earliest deadline, None as long as nobody said anything."""
        return min(self._given.copy().values(), key=lambda one: one.deadline_s, default=None)

    def give(self, source: str, *, left_s: float) -> None:
        """What a watcher has learnt: the process ends in `left_s` seconds. From any thread; of one source the first holds."""
        now_s = time.monotonic()
        self._given.setdefault(source, Notice(source, now_s, now_s + max(0.0, left_s)))

    def close(self) -> None:
        """The signals are handled as before, unless somebody set another handler meanwhile. The second call does nothing."""
        for one, before in self._before.items():
            if self._process == os.getpid() and signal.getsignal(one) == self._handle:
                signal.signal(one, before)
        self._process = 0

    def __enter__(self) -> Notices:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        one = signal.Signals(number)
        before = self._before[one]
        if self._process != os.getpid():  # forked, or closed while a later handler still calls this one
            return self._as_before(one, frame)
        self.give(one.name, left_s=self._deadlines_s[one])
        if callable(before):
            before(number, frame)
        return None

    def _as_before(self, one: signal.Signals, frame: FrameType | None) -> None:
        before = self._before[one]
        if callable(before):
            before(one, frame)
        elif before == signal.SIG_DFL:  # a data loader's worker must end by the SIGTERM that it is sent
            signal.signal(one, signal.SIG_DFL)
            os.kill(os.getpid(), one)


def heard_here(signals: Mapping[signal.Signals, float], *, where: str) -> Mapping[signal.Signals, float]:
    """Those of which `Notices` can hear if this thread makes them: all in the main thread; none elsewhere, with a warning that
    names the run, `where`. [RUN-94]"""
    thread = threading.current_thread()
    if not signals or thread is threading.main_thread():
        return signals
    names = ", ".join(one.name for one in signals)
    log.warning(
        "%s: this run was made in thread %r and will not hear %s, as only the main thread can set handlers: make it there, or "
        "call run.notify() from handlers of your own",
        *(where, thread.name, names),
    )
    return {}


@dataclass(frozen=True, slots=True)
class LastStep:
    """Everybody stops after `step`; `saves` says whether it is saved, `why` in words what decided that."""

    step: int
    saves: bool
    why: str


def decide_ending(
    left_s: Mapping[int, float], *, step: int, step_s: float, save_s: float, due: Collection[int] = ()
) -> LastStep | None:
    """Rank 0, when it completed `step`: after which later step the job ends, to be published now; None without a notice.

    `left_s`: of the ranks that noticed something, seconds until their deadline. `step_s` is what a step takes, `save_s` a save
    from its begin until it is committed, both as measured. `due`: later steps at which a save is due already.

    The job ends after the first step that nobody can have reached. That one is saved if this fits the nearest deadline with a
    margin, and not if a save is due at the step before it, which then is the last.
    """
    if not left_s:
        return None
    at = step + LEAD_STEPS
    rank = min(left_s, key=lambda one: (left_s[one], one))
    needed = MARGIN * (LEAD_STEPS * step_s + save_s)
    times = f"{left_s[rank]:.1f} s are left on rank {rank}, {needed:.1f} s are needed"
    before = [one for one in due if step < one < at]
    if before:
        return LastStep(at, False, f"step {max(before)} is the last save, due already; {times}")
    if needed > left_s[rank]:
        return LastStep(at, False, f"no save fits, the checkpoint before is kept: {times}")
    return LastStep(at, True, f"a last save fits: {times}")
