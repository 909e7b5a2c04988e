"""What workers of the tests run: members that sleep instead of training, and do as their arguments say at a point.

    sleeper.py STEPS SECONDS [WHAT:POINT:STAGE:STEP ...]

WHAT is `kill`, `stop`, `hang`, `exit` or `raise` (once: by the process that is first there, which makes a file), or
`raise-always`.
POINT is one of `start`, `join`, `form`, `mend`, `short` (in a phase of at most four seconds), `compute`, `ready`, `step`,
`stepped`, `leave`; or `after`, whose STAGE is the step at the end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from elastickpt.elastic.joining import Job, join
from elastickpt.elastic.membership import (
    Compute,
    Computed,
    Erred,
    Failed,
    Form,
    LoopEnded,
    Made,
    Mend,
    Mended,
    Stop,
    TakeStep,
    Took,
)
from elastickpt.elastic.messages import Terms

STEPS, SECONDS, FAULTS = int(sys.argv[1]), float(sys.argv[2]), [one.split(":") for one in sys.argv[3:]]
MARKS = Path(os.environ["SLEEPER_MARKS"])


def at(point: str, stage: int | None, step: int) -> None:
    for number, (what, where, of_stage, of_step) in enumerate(FAULTS):
        if (where, of_step) == (point, str(step)) and of_stage in ("*", str(stage)):
            mark = MARKS / f"fault-{number}"
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                if what != "raise-always":
                    continue
            if what in ("kill", "stop"):
                os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
            elif what == "exit":
                os._exit(3)
            elif what == "hang":
                threading.Event().wait()
            else:
                raise ValueError(f"a fault of the test at {point}")


def sleep(task: object, seconds: float, interrupted: threading.Event) -> bool:
    """Whether the task was over before."""
    return interrupted.wait(seconds) or task.over  # type: ignore[attr-defined]


def train(job: Job) -> int:
    """The step at which this member stood at the end."""
    interrupted = threading.Event()
    job.on_interrupt(interrupted.set)
    job.declare(Terms(rungs=("partner", "checkfree"), swap=True))
    stands = last = 0
    while not isinstance(act := (task := job.next_task()).act, Stop):
        interrupted.clear()
        if isinstance(act, Form):
            at("form", job.rank, act.view.step)
            last = len(act.view.places) - 1
            exchange = job.exchange(task)
            exchange.set(f"at/{job.rank}", b"here")
            try:
                for stage in range(len(act.view.places)):
                    exchange.get(f"at/{stage}", limit_s=20.0)
            except Exception as error:
                job.done(task, Failed(str(error)))
                continue
            job.done(task, Made())
        elif isinstance(act, Mend):
            at("mend", job.rank, act.view.step)
            job.done(task, Mended(moved=8))
        elif isinstance(act, Compute):
            if act.go is not None:
                stands = act.go.step
            if act.step > STEPS or act.ending:
                at("leave", job.rank, act.step)
                job.done(task, LoopEnded())
                continue
            job.began()
            (MARKS / f"begun-{job.rank}").touch()
            try:
                with job.phase("short", limit_s=4.0):
                    at("short", job.rank, act.step)
                with job.phase("step"), job.own_code():
                    at("compute", job.rank, act.step)
                    if sleep(task, SECONDS, interrupted):
                        continue
            except ValueError:
                job.done(task, Erred(traceback.format_exc()))
                continue
            job.done(task, Computed(norm=1.0, losses=(float(act.step),) if job.rank == last else ()))
            at("ready", job.rank, act.step)
        elif isinstance(act, TakeStep):
            at("step", job.rank, act.step)
            stands = act.step
            job.done(task, Took())
            at("stepped", job.rank, act.step)
    return stands


if __name__ == "__main__":
    at("start", None, 0)
    with join() as job:
        (MARKS / f"in-{os.getpid()}").touch()
        at("join", job.rank, 0)
        stands = train(job)
        if job.rank is not None:
            (MARKS / f"end-{job.rank}").write_text(f"{stands}")
        job.require_good_end()
    at("after", stands, 0)
