"""How long a step waits for its decision: from the last member's ready until each member has read what the register holds.

    python -m tools.decision_time [STEPS]        six members that sleep 50 ms a step, with a coordinator in the launcher

Prints milliseconds, and the CPU time of the members' threads that hold the connection. Asserts nothing: these machines are
noisy.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from elastickpt.elastic.agent import WorkerProgram
from elastickpt.elastic.duties import TaskOutcome
from elastickpt.elastic.joining import Job, join
from elastickpt.elastic.ladder import ladder_of
from elastickpt.elastic.launcher import Here, Launch, launch
from elastickpt.elastic.membership import Compute, Computed, Form, LoopEnded, Made, Mend, Mended, Stop, TakeStep, Took
from elastickpt.elastic.messages import Terms
from elastickpt.elastic.stream import new_token

MEMBERS, STEP_S = 6, 0.05


def member(job: Job, steps: int) -> dict[str, object]:
    """When this member was ready, and when it had read the decision, of each step; CLOCK_MONOTONIC."""
    ready, read = [], []
    job.declare(Terms())
    while not isinstance(act := (task := job.next_task()).act, Stop):
        if isinstance(act, TakeStep):
            read.append(time.monotonic())
            job.done(task, Took())
        elif isinstance(act, Compute) and act.step <= steps:
            time.sleep(STEP_S)
            ready.append(time.monotonic())
            job.done(task, Computed(norm=1.0))
        else:
            cpu_s = thread_cpu_s("elastickpt-job")
            outcomes: dict[type, TaskOutcome] = {Form: Made(), Mend: Mended(), Compute: LoopEnded()}
            job.done(task, outcomes[type(act)])
    return {"ready": ready, "read": read, "cpu_s": cpu_s}


def thread_cpu_s(name: str) -> float:
    """Processor time of the thread of this name in this process, in seconds."""
    (found,) = (one for one in threading.enumerate() if one.name == name)
    fields = Path(f"/proc/self/task/{found.native_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = WorkerProgram((__file__, "member", str(steps), folder))
        here = Here(program, MEMBERS, "here", "")
        end = launch(Launch(here, MEMBERS, new_token(), 0), ladder_of)
        if end.code != 0:
            raise SystemExit(f"the job ended: {end.message}")
        found = [json.loads(one.read_text()) for one in sorted(Path(folder).iterdir())]
    last = [max(times) for times in zip(*(one["ready"] for one in found), strict=True)]
    waits = sorted(1000 * (at - ready) for one in found for at, ready in zip(one["read"], last, strict=True))
    print(
        f"{MEMBERS} members, {steps} steps of {1000 * STEP_S:g} ms, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"
    )
    print(f"last ready to own reading of the decision: median {statistics.median(waits):.3f} ms, ", end="")
    print(f"p95 {waits[int(0.95 * len(waits))]:.3f} ms, most {waits[-1]:.3f} ms")
    share = sum(one["cpu_s"] for one in found) / len(found) / (steps * STEP_S)
    print(f"the thread that holds the connection: {100 * share:.2f} % of a processor")


def main() -> None:
    if sys.argv[1:2] == ["member"]:
        with join() as job:
            found = member(job, int(sys.argv[2]))
            (Path(sys.argv[3]) / f"{job.rank}.json").write_text(json.dumps(found))
    else:
        measure(int(sys.argv[1]) if len(sys.argv) > 1 else 200)


if __name__ == "__main__":
    main()
