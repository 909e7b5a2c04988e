"""How long training stands still after a kill: from the signal until the last member begins the first microbatch of what runs
next, by phase.

    python -m tools.kill_times --rung checkfree                 50 kills of one job of six stages, a warm spare each time
    python -m tools.kill_times --rung partner --kills 50 --record FILE
    python -m tools.kill_times --rung checkfree --cold          no spare: a process is forked for the lost place
    python -m tools.kill_times --rung checkfree --stop          SIGSTOP: noticed by the heartbeat
    python -m tools.kill_times --torchrun --kills 5             the same model under torchrun, which starts all ranks anew

The job is that of the demo of recovery, `examples/lose_a_stage.py`, with a run that is saved every 10 steps. A kill comes at a
random moment of a step that no save is near to, when every place is held, the spare has joined and nothing is under way; the
victims of a rung are the stages for which it is possible, drawn by `--seed`.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench import machine

STAGES, EVERY, LIMIT_S = 6, 10, 120.0
EXAMPLE = machine.REPOSITORY / "examples" / "lose_a_stage.py"
RESTARTED = Path(__file__).with_name("restarted_stage.py")
PHASES = ("detected", "unblocked", "formed", "rebuilt", "first_microbatch")
VICTIMS = {"partner": (0, 1, 4, 5), "checkfree": (2, 3), "stale": tuple(range(STAGES))}
RUNGS = {rung: ",".join(dict.fromkeys((rung, "partner", "checkfree", "stale", "rollback"))) for rung in VICTIMS}
RUNGS["checkfree"] = RUNGS["partner"]
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else ranks that torchrun starts anew find addresses of ended ones
LAUNCH = "import sys; from elastickpt.cli.launch import main; sys.exit(main())"


@dataclass(frozen=True, slots=True)
class Options:
    """`way`: how a place comes to be empty and filled."""

    rung: str
    kills: int
    seed: int
    way: str
    heartbeat_s: float


@dataclass(frozen=True, slots=True)
class Kill:
    """`seconds`: from the signal until each phase was reached, None for one that was not."""

    stage: int
    after_step: int
    rung: str
    seconds: dict[str, float | None]
    moved: int = 0
    read: int = 0


class Started:
    """A launcher whose output is heard line by line, and what its workers print of steps."""

    def __init__(self, command: Sequence[object], folder: Path) -> None:
        self.folder = folder
        here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(machine.REPOSITORY), **OWN_STORE}
        environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, **here}
        with (folder / "stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                [str(one) for one in command], stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def step(self) -> int:
        """The next step that is told of, waited for."""
        while True:
            try:
                line = self._lines.get(timeout=LIMIT_S)
            except queue.Empty:
                raise SystemExit(f"no step within {LIMIT_S:g} s; {self.said()}") from None
            if line.startswith('{"step"'):
                return int(json.loads(line)["step"])

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + LIMIT_S
        while not (found := holds()):
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{what}: not seen; {self.said()}")
            time.sleep(0.01)
        return found

    def said(self) -> str:
        return f"the job: {self.process.poll()}\n{(self.folder / 'stderr').read_text()[-4000:]}"

    def events(self, kind: str) -> list[dict[str, Any]]:
        try:
            lines = (self.folder / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [event for event in map(json.loads, lines) if event["event"] == kind]


@contextmanager
def started(command: Sequence[object], folder: Path) -> Iterator[Started]:
    """Ended by SIGTERM at the end of the block."""
    job = Started(command, folder)
    try:
        yield job
    finally:
        job.process.terminate()
        try:
            job.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


def measured(options: Options, tell: Callable[[str], None]) -> list[Kill]:
    """Kills of one job under `elastickpt-run`. Blocking."""
    drawn = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        spares = ["--spares", 0 if options.way == "cold" else 1, "--max-replacements", options.kills]
        flags = ["--stages", STAGES, *spares, "--heartbeat", options.heartbeat_s, "--events", folder / "events.jsonl"]
        script = [EXAMPLE, "--steps", 10**6, "--root", folder / "run", "--rungs", RUNGS[options.rung], "--save-every", EVERY]
        found: list[Kill] = []
        with started((sys.executable, "-c", LAUNCH, *flags, *script), folder) as job:
            job.until(lambda: len(job.events("member")) >= STAGES + (options.way != "cold"), "all members")
            while len(found) < options.kills:
                found.append(_kill(job, options, drawn, len(found)))
                tell(f"kill {len(found)}: stage {found[-1].stage}, {_ms(found[-1].seconds['first_microbatch'])} ms")
    return found


def _kill(job: Started, options: Options, drawn: random.Random, number: int) -> Kill:
    """One kill between two saves, of a stage that has a spare, and what the job's event says of it."""
    steps = [job.step()]
    while len(steps) < 4 or steps[-1] % EVERY != EVERY // 2:
        steps.append(job.step())
    job.until(lambda: _spares(job) or options.way == "cold", "a spare")
    held = {event["place"]["stage"]: event["pid"] for event in job.events("member") if event["place"]}
    stage = drawn.choice(VICTIMS[options.rung])
    time.sleep(drawn.uniform(0.0, 0.2))
    at = time.time()
    os.kill(held[stage], signal.SIGSTOP if options.way == "stop" else signal.SIGKILL)
    job.until(lambda: len(job.events("recovery")) > number, "a recovery")
    event = job.events("recovery")[number]
    began = event["time"] - event["seconds"]["rebuilt"] - at  # of the job's own time line, after the signal
    seconds = {phase: None if (told := event["seconds"][phase]) is None else began + told for phase in PHASES}
    return Kill(stage, event["step"], event["rung"], seconds, event["bytes"]["moved"], event["bytes"]["read"])


def _spares(job: Started) -> set[str]:
    """Who has joined and never held a place."""
    members = job.events("member")
    return {event["uid"] for event in members} - {event["uid"] for event in members if event["place"]}


def restarted(options: Options, tell: Callable[[str], None]) -> list[Kill]:
    """Kills of one job under torchrun, which ends all ranks and starts them anew; these load the newest checkpoint."""
    drawn = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        flags = ("--nproc-per-node", STAGES, "--max-restarts", options.kills, "--rdzv-backend", "c10d", "--rdzv-endpoint")
        script = (RESTARTED, folder / "run", EVERY, folder)
        command = (sys.executable, "-m", "torch.distributed.run", *flags, "127.0.0.1:0", *script)
        found: list[Kill] = []
        with started(command, folder) as job:
            while len(found) < options.kills:
                job.until(lambda: len(_began(folder, len(found))) == STAGES, "the first microbatch of all ranks")
                step = job.step()
                while step % EVERY != EVERY // 2:
                    step = job.step()
                stage = drawn.randrange(STAGES)
                pid = _began(folder, len(found))[stage][0]
                time.sleep(drawn.uniform(0.0, 0.2))
                at = time.time()
                os.kill(pid, signal.SIGKILL)
                job.until(lambda: len(_began(folder, len(found) + 1)) == STAGES, "the first microbatch of all ranks")
                first = max(when for _, when in _began(folder, len(found) + 1).values()) - at
                found.append(Kill(stage, step, "restart + load", dict.fromkeys(PHASES) | {PHASES[-1]: first}))
                tell(f"kill {len(found)}: rank {stage}, {first:.2f} s")
    return found


def _began(folder: Path, life: int) -> dict[int, tuple[int, float]]:
    """By rank, its process and when it began the first microbatch, of the ranks that were started so often before."""
    found = {}
    for path in folder.glob(f"began-{life}-*"):
        pid, _, when = path.read_text().partition(" ")
        found[int(path.name.rpartition("-")[2])] = int(pid), float(when)
    return found


def table(kills: Sequence[Kill], options: Options) -> Table:
    """Medians and 95th percentiles, by rung."""
    title = f"{options.way}, seed {options.seed}: ms after the signal, median / 95th percentile / most"
    shown = Table(title=title, title_justify="left")
    for column in ("rebuilt by", "kills", *(phase.replace("_", " ") for phase in PHASES), "moved, MB", "read, MB"):
        shown.add_column(column, justify="right")
    for rung in dict.fromkeys(kill.rung for kill in kills):
        mine = [kill for kill in kills if kill.rung == rung]
        cells = [_spread([kill.seconds[phase] for kill in mine]) for phase in PHASES]
        moved, read = (statistics.median(getattr(kill, name) for kill in mine) / 1e6 for name in ("moved", "read"))
        shown.add_row(rung, str(len(mine)), *cells, f"{moved:.2f}", f"{read:.2f}")
    return shown


def _spread(seconds: Sequence[float | None]) -> str:
    known = sorted(one for one in seconds if one is not None)
    if not known:
        return "-"
    late = known[min(len(known) - 1, int(0.95 * len(known)))]
    return f"{_ms(statistics.median(known))} / {_ms(late)} / {_ms(known[-1])}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rung", choices=tuple(VICTIMS), default="checkfree")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--heartbeat", type=float, default=5.0, help="seconds of silence after which a worker is lost")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--cold", dest="way", action="store_const", const="cold", help="no spare: a process is forked")
    ways.add_argument("--stop", dest="way", action="store_const", const="stop", help="SIGSTOP")
    ways.add_argument("--torchrun", dest="way", action="store_const", const="torchrun", help="all ranks are started anew")
    parser.add_argument("--record", type=Path, help="a file for all kills, as JSON")
    told = parser.parse_args()
    options = Options(told.rung, told.kills, told.seed, told.way or "warm", told.heartbeat)
    talk = Console(stderr=True, highlight=False)
    load = os.getloadavg()[0]
    kills = (restarted if options.way == "torchrun" else measured)(options, talk.print)
    Console(width=None if sys.stdout.isatty() else 150).print(table(kills, options))
    print(f"{os.cpu_count()} processors, load before {load:.1f}")
    if told.record:
        members = {"machine": asdict(machine.describe(())), "load_before": load, "options": asdict(options)}
        told.record.write_text(json.dumps({**members, "kills": [asdict(kill) for kill in kills]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
