"""All limits of a job under the launcher, in one table: what each bounds, its default or formula, and its flag. [REC-33]"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Literal

from elastickpt.elastic.messages import OWN_CODE, Terms

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
BEATS = 5  # within the limit
MAX_BEAT_S = 1.0
SPARE_WAIT_S = 600.0
HELLO_S = 30.0
COORDINATOR_S = 60.0
AGAIN_S = 0.1
DYING_S = 5.0
BROKEN_S = 1.0
QUITTING_S = 5.0
LEAVING_S = 5.0
PARTING_S = 30.0
REAPED_S = 10.0
ENDING_S = 600.0
BUILDING_S = 600.0
OTHERS_S = 3600.0
FORMING_S = 10.0
KILLED_AFTER_S = LEAVING_S + 3.0
OLD_SAVES_S = 1.5  # as `runs.view_saves` has it, which imports torch
HISTORY = 60  # minutes whose longest time between two signs of progress a phase remembers
AT_LEAST_S = 30.0
TIMES_LONGEST = 10.0
FRUITLESS = 3


@dataclass(frozen=True, slots=True)
class Limit:
    name: str
    bounds: str
    value: str
    flag: str


@dataclass(frozen=True, slots=True)
class Limits:
    """Those that a user can set, in seconds."""

    heartbeat_s: float = HEARTBEAT_S
    spare_wait_s: float | None = None

    @property
    def beat_s(self) -> float:
        return min(MAX_BEAT_S, self.heartbeat_s / BEATS)

    def wait_s(self, of: Literal["spare", "broken"], terms: Terms | None) -> float:
        """How long is waited for a spare, or for news of members that cannot reach each other."""
        if of == "broken":
            return BROKEN_S
        policy = SPARE_WAIT_S if terms is None else terms.spare_wait_s
        return policy if self.spare_wait_s is None else self.spare_wait_s

    def table(self) -> tuple[Limit, ...]:
        spare = "Policy.spare_wait_s, 600 s" if self.spare_wait_s is None else f"{self.spare_wait_s:g} s"
        return (
            Limit(
                "heartbeat",
                f"the silence of a worker that sends a beat every {self.beat_s:g} s",
                f"{self.heartbeat_s:g} s",
                "--heartbeat",
            ),
            Limit("spare wait", "how long an empty place waits for a process", spare, "--spare-wait"),
            Limit(
                "progress",
                "the time between two signs of progress of a worker in a declared phase, after the first ones",
                f"{TIMES_LONGEST:g} x the longest of the last {HISTORY} minutes in that phase, at least {AT_LEAST_S:g} s",
                "job.phase(limit_s=)",
            ),
            Limit(
                "own code",
                "the same of a worker at work in a step, or an evaluation, where no phase is declared",
                f"{TIMES_LONGEST:g} x the longest of the last {HISTORY} minutes, at least {BUILDING_S:g} s",
                "job.phase(limit_s=)",
            ),
            Limit("first progress", "the same, while the phase has no history", f"{BUILDING_S:g} s", "job.phase(limit_s=)"),
            Limit("losses of a step", "how often one step is lost before the job ends", "3", "Policy.max_losses_of_step"),
            Limit(
                "broken", "members that cannot reach each other though all live, before they form anew", f"{BROKEN_S:g} s", ""
            ),
            Limit("dying", "from the end of a worker's connection until its process has ended by itself", f"{DYING_S:g} s", ""),
            Limit("quitting", "from an error that left a worker's block until its process has ended", f"{QUITTING_S:g} s", ""),
            Limit(
                "others",
                "how long a member waits for what others build or read; a loss among them ends it",
                f"{OTHERS_S:g} s",
                "",
            ),
            Limit("forming", "from when all members are there until they are connected", f"{FORMING_S:g} s", ""),
            Limit("old saves", "from a new view until what was being saved in the old one has ended", f"{OLD_SAVES_S:g} s", ""),
            Limit("coordinator", "how long --join waits for the coordinator to listen", f"{COORDINATOR_S:g} s", ""),
            Limit("hello", "how long a caller has to prove the token", f"{HELLO_S:g} s", ""),
            Limit("ending", "from SIGTERM until the next step is done and saved", f"{ENDING_S:g} s", ""),
            Limit("leaving", "from the launcher's end until a worker has left by itself", f"{LEAVING_S:g} s", ""),
            Limit("killed", "from the launcher's end until what is left of its workers is killed", f"{KILLED_AFTER_S:g} s", ""),
            Limit("parting", "from an end that is none of being done until a worker has left", f"{PARTING_S:g} s", ""),
            Limit("reaped", "from a kill until its place is given away, reaped or not", f"{REAPED_S:g} s", ""),
            Limit(
                "fruitless", "replacements in a row that end before they join, until no more are started", str(FRUITLESS), ""
            ),
        )


class PhaseTimes:
    """What the longest time between two signs of progress was, by phase and minute, of all workers."""

    def __init__(self) -> None:
        self._times: dict[str, deque[tuple[int, float]]] = {}
        self._logged: dict[str, int] = {}

    def note(self, phase: str, seconds: float, *, now: float) -> None:
        times, minute = self._times.setdefault(phase, deque(maxlen=HISTORY)), int(now // 60)
        if times and times[-1][0] == minute:
            _, before = times.pop()
            seconds = max(seconds, before)
        times.append((minute, seconds))
        while times[0][0] <= minute - HISTORY:
            times.popleft()

    def limit_s(self, phase: str) -> float:
        """Own code that declares nothing has the longer time: what compiles anew in the middle of a run is not lost for it."""
        times = self._times.get(phase)
        if not times:
            return BUILDING_S
        return max(BUILDING_S if phase == OWN_CODE else AT_LEAST_S, TIMES_LONGEST * max(longest for _, longest in times))

    def log_changes(self) -> None:
        """Says which limits are in force, when they are first derived and whenever they change."""
        in_force = {phase: round(self.limit_s(phase)) for phase in sorted(self._times)}
        if in_force != self._logged:
            self._logged = in_force
            log.info("limits of progress: %s", ", ".join(f"{phase} {limit_s} s" for phase, limit_s in in_force.items()))
