"""Six pipeline stages train; stages are killed, and training goes on in the same processes; then the run without failures.

    python examples/demo_recovery.py

SIGKILL to a middle stage, to the first one, and to two stages apart at once. Per loss a timeline, in a table; the loss curves
of both runs in out/recovery/loss.png; what watching over the job costs, and how long a step waits for its decision.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from elastickpt.elastic.duties import TaskOutcome
from elastickpt.elastic.joining import Job as Membership
from elastickpt.elastic.joining import JobTask
from elastickpt.elastic.membership import Compute, Computed, TakeStep

OUT = Path("out/recovery")
STAGES, STEPS = 6, 120
KILLS = {30: (3,), 60: (0,), 90: (1, 4)}  # after how many steps, which stages
SCRIPT = Path(__file__).parent / "lose_a_stage.py"
console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)


@dataclass
class Job:
    """One run: its losses by step, the loss on held-out text, its recoveries. `control`: the processor's seconds that members'
    threads which watch over the job took, and all that members took."""

    name: str
    kills: dict[int, tuple[int, ...]]
    losses: dict[int, float] = field(default_factory=dict)
    held_out: float = float("nan")
    control: tuple[float, float] = (0.0, 1.0)

    @property
    def folder(self) -> Path:
        return OUT / self.name

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def holder(self, stage: int) -> int:
        """The process that holds the stage now."""
        return int([event for event in self.events("member") if event["place"] and event["place"]["stage"] == stage][-1]["pid"])

    def carry_out(self) -> None:
        """Trains to the end; kills when it is time."""
        (self.folder / "decisions").mkdir(parents=True)
        launcher = [sys.executable, "-c", "import sys; from elastickpt.cli.launch import main; sys.exit(main())"]
        flags = ["--stages", STAGES, "--spares", 2, "--max-replacements", 4, "--events", self.folder / "events.jsonl"]
        script = [__file__, "member", self.folder / "decisions", "--steps", STEPS, "--root", self.folder / "run"]
        script += ["--rungs", "partner,checkfree,stale,rollback"]
        command = [str(part) for part in (*launcher, *flags, *script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.folder / "stderr").open("w") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
            assert process.stdout is not None
            for line in process.stdout:
                self.hear(line)
        if process.wait() != 0:
            raise SystemExit(f"{self.name}: ended with {process.returncode}\n{(self.folder / 'stderr').read_text()}")

    def decisions_ms(self) -> list[float]:
        """From the last member's ready to each member's own reading of the decision; of the steps that no loss interrupted."""
        ready, read = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list)
        for one in (self.folder / "decisions").iterdir():
            for what, step, at in json.loads(one.read_text()):
                (ready if what == "ready" else read)[step].append(at)
        whole = (step for step in read if len(ready[step]) == len(read[step]) == STAGES)
        return [1000 * (at - max(ready[step])) for step in whole for at in read[step]]

    def hear(self, line: str) -> None:
        if not line.startswith("{"):
            return
        told = json.loads(line)
        self.held_out = told.get("held out", self.held_out)
        if "step" not in told:
            return
        self.losses[told["step"]] = told["loss"]
        if told["step"] == STEPS:
            self.control = control_of([self.holder(stage) for stage in range(STAGES)])
        if told["step"] % 20 == 0:
            console.print(f"{self.name}: step {told['step']}, loss {told['loss']:.3f}")
        for stage in self.kills.pop(told["step"], ()):
            console.print(f"{self.name}: SIGKILL to stage {stage} after step {told['step']}")
            os.kill(self.holder(stage), signal.SIGKILL)


def control_of(pids: list[int]) -> tuple[float, float]:
    """The processor's seconds of these processes' threads that hold the connection to the coordinator, and of all threads."""
    control = every = 0.0
    for task in (task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()):
        seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
        every += seconds
        control += seconds * ((task / "comm").read_text().strip() == "elastickpt-job")
    return control, every


def member(decisions: Path, argv: list[str]) -> None:
    """The example, as a worker runs it; and when it was ready and had read the decision, of each step, by CLOCK_MONOTONIC."""
    times: list[tuple[str, int, float]] = []
    done, next_task = Membership.done, Membership.next_task

    def noted_done(job: Membership, task: JobTask, outcome: TaskOutcome) -> None:
        if isinstance(task.act, Compute) and isinstance(outcome, Computed):
            times.append(("ready", task.act.step, time.monotonic()))
        done(job, task, outcome)

    def noted_next(job: Membership) -> JobTask:
        task = next_task(job)
        if isinstance(task.act, TakeStep):
            times.append(("read", task.act.step, time.monotonic()))
        return task

    Membership.done, Membership.next_task = noted_done, noted_next  # type: ignore[method-assign, assignment]
    sys.argv = [str(SCRIPT), *argv]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (decisions / f"{os.getpid()}.json").write_text(json.dumps(times))


def main() -> None:
    if len(sys.argv) > 1:
        raise SystemExit(__doc__)
    shutil.rmtree(OUT, ignore_errors=True)
    jobs = [Job("killed", dict(KILLS)), Job("undisturbed", {})]
    for job in jobs:
        job.carry_out()
    killed, undisturbed = jobs
    recoveries = killed.events("recovery")
    console.print(timeline(recoveries))
    console.print(f"loss on held-out text: {killed.held_out:.4f}, without failures {undisturbed.held_out:.4f}")
    for job in jobs:
        control, every = job.control
        console.print(f"{job.name}: {100 * control / every:.2f} % of what members take is for watching over the job")
    waits = sorted(undisturbed.decisions_ms())
    console.print(f"last ready to own reading of the decision: median {statistics.median(waits):.2f} ms, ", end="")
    console.print(f"95th percentile {waits[int(0.95 * len(waits))]:.2f} ms")
    draw(killed, undisturbed, recoveries, OUT / "loss.png")
    console.print(f"curves: {OUT / 'loss.png'}")


def timeline(recoveries: list[dict[str, Any]]) -> Table:
    table = Table(title="milliseconds since the last sign of life of what was lost", box=box.SIMPLE_HEAD)
    phases = ("detected", "unblocked", "formed", "rebuilt", "first_microbatch")
    for name in ("after step", "stages", "rebuilt from", "decision", *(phase.replace("_", " ") for phase in phases), "moved"):
        table.add_column(name, justify="left" if name in ("stages", "rebuilt from", "decision") else "right")
    for event in recoveries:
        sources = ", ".join(f"{lost['rung']} {told(lost['from'])}" for lost in event["lost"])
        times = [event["seconds"][phase] for phase in phases]
        shown = ["-" if one is None else f"{one * 1000:.0f}" for one in times]
        stages = ", ".join(str(lost["stage"]) for lost in event["lost"])
        moved = f"{event['bytes']['moved'] / 1e6:.1f} MB"
        table.add_row(str(event["step"]), stages, sources, event["decision"], *shown, moved)
    return table


def told(source: dict[str, Any]) -> str:
    return f"of step {source['step']}" if "path" in source else "of " + " and ".join(map(str, source["stages"]))


def draw(killed: Job, undisturbed: Job, recoveries: list[dict[str, Any]], path: Path) -> None:
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*sorted(undisturbed.losses.items()), strict=True), color="#9AA4AF", label="without failures")
        axes.plot(*zip(*sorted(killed.losses.items()), strict=True), color="#0072B2", label="stages killed")
        for event in recoveries:
            stages = " and ".join(str(lost["stage"]) for lost in event["lost"])
            axes.axvline(event["step"], color="#C1121F", linewidth=0.8)
            axes.annotate(f" stage {stages}", (event["step"], axes.get_ylim()[1]), va="top", color="#C1121F")
        axes.set(xlabel="completed steps", ylabel="loss, nats per byte", yscale="log")
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted("{x:g}")
        axes.legend(frameon=False)
        figure.savefig(path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["member"]:
        member(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
