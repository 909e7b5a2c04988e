"""Whether anybody is taken for lost who is not: a long job on processors that have other work, too.

    python -m tools.steady_run --minutes 20              eight stages and a spare, beside four processes that never wait
    python -m tools.steady_run --minutes 3 --burners 8 --heartbeat 5

Nobody is killed, so each loss is a false one. Prints how many there were, the steps, and the longest time between two steps.
Exit code 1 where there was a loss.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tools.kill_times import EXAMPLE, LAUNCH, started

STAGES, LAYERS = 8, 16


def burner() -> subprocess.Popen[bytes]:
    """A process that has always something to do."""
    return subprocess.Popen([sys.executable, "-c", "while True: pass"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--burners", type=int, default=4, help="processes beside the job that never wait")
    parser.add_argument("--heartbeat", type=float, default=5.0, help="seconds of silence after which a worker is lost")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as top, ExitStack() as stack:
        folder = Path(top)
        flags = (
            "--stages",
            STAGES,
            "--spares",
            1,
            "--max-replacements",
            100,
            "--heartbeat",
            told.heartbeat,
            "--events",
            folder / "events.jsonl",
        )
        script = (EXAMPLE, "--steps", 10**6, "--root", folder / "run", "--layers", LAYERS, "--swap", "", "--save-every", 100)
        job = stack.enter_context(started((sys.executable, "-c", LAUNCH, *flags, *script), folder))
        for _ in range(told.burners):
            one = burner()
            stack.callback(one.wait)
            stack.callback(one.kill)
        until, steps, longest, before = time.monotonic() + 60 * told.minutes, 0, 0.0, None
        while (now := time.monotonic()) < until:
            job.step()
            steps, now = steps + 1, time.monotonic()
            longest = longest if before is None else max(longest, now - before)
            before = now
        lost = [one for event in job.events("recovery") for one in event["lost"]]
    load = os.getloadavg()[0]
    print(f"{STAGES} stages, {told.burners} processes beside them on {os.cpu_count()} processors, load {load:.1f} at the end")
    print(f"{told.minutes:g} minutes, heartbeat {told.heartbeat:g} s: {steps} steps, at most {longest:.2f} s between two")
    print(f"taken for lost: {len(lost)}" + "".join(f"; stage {one['stage']}: {one['why']}" for one in lost))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
