"""Members of a training job are killed and stopped at ordered moments; whether training goes on from the right state.

A job has several faults, some steps apart. A fault is struck by the member that comes to its moment first, so that the moment
is exact and needs no clock. Everything is drawn from the seed. What is judged, of each job:

    hang     no step was completed within 15 s of a fault (behind a SIGSTOP and the heartbeat limit, 15 s more), or no end came
    torn     some member had another state, loss or evaluation than one process has that takes the same steps and recoveries
    leak     processes, threads, descriptors, sockets or mappings that were not there before the first fault
    other    the job ended otherwise than it had to
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

import elastickpt as ek
from elastickpt.errors import CheckpointError
from elastickpt.ledger.branch import history
from tools.bench.machine import REPOSITORY

from .recovery_model import Astray, Led
from .recovery_plans import MICROBATCHES, STAGES, Plan

GOES_ON_S = 15.0
LAUNCH = "import sys; from elastickpt.cli.launch import main; sys.exit(main())"
MARK = "ELASTICKPT_CHAOS"
WRITERS_S = 80.0  # for a minute a writer waits for that of a lost member, which may be revived
TRAINEE = Path(__file__).with_name("recovery_trainee.py")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one job. `bad`: outcome → why, empty where all is well. `rungs`: by which lost places were filled;
    `slowest_s`: from a fault to the next completed step. `losses`: the curve, as stage 0 told it."""

    plan: Plan
    bad: Mapping[str, str]
    rungs: tuple[str, ...]
    slowest_s: float
    seconds: float
    losses: tuple[tuple[int, float], ...]


# -- one job


@dataclass
class Job:
    """What one start of a plan left: its exit code, None where it did not end; its events; the notes of its members, in order;
    the processes of it that had to be killed; the last words on its stderr."""

    code: int | None
    events: list[dict[str, Any]]
    notes: list[dict[str, Any]]
    left: str = ""
    said: str = ""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [note for note in self.notes if note["kind"] == kind]

    def recoveries(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "recovery"]


def start(plan: Plan, folder: Path, *, limit_s: float) -> Job:
    """One start of a plan, to its end. Blocking. Nobody of it is left."""
    mark, began = secrets.token_hex(8), time.monotonic()
    events = folder / f"events-{mark}.jsonl"
    spares = ["--spares", plan.spares, "--max-replacements", 1000] if plan.spares else ["--spare-wait", 0.5]
    flags = ["--stages", STAGES, *spares, "--heartbeat", plan.heartbeat_s, "--events", events]
    command = [sys.executable, "-c", LAUNCH, *flags, TRAINEE, plan.to_json(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: mark, "PYTHONPATH": str(REPOSITORY)}
    code: int | None = None
    with (folder / "stderr").open("ab") as stderr:
        process = subprocess.Popen([str(one) for one in command], stdout=stderr, stderr=stderr, env=environment)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
    finally:
        left = "; ".join(_ended(mark, 0.0 if code is None else WRITERS_S))
        process.wait()
    lines = [line for path in folder.glob("notes-*") for line in path.read_text().splitlines()]
    told = [note for note in map(json.loads, lines) if note["at"] >= began]
    notes = sorted(told, key=lambda note: float(note["at"]))
    happened = [json.loads(line) for line in events.read_text().splitlines()]
    return Job(code, happened, notes, left, (folder / "stderr").read_text()[-1500:])


def _ended(mark: str, settle_s: float) -> list[str]:
    """Nobody of the job is left; those that had not ended by themselves in time."""
    until = time.monotonic() + settle_s
    while (found := list(_alive(mark))) and time.monotonic() < until:
        time.sleep(0.05)
    named = []
    for one in found:
        with suppress(psutil.NoSuchProcess):
            named.append((one, " ".join(one.cmdline())[-120:]))
            one.kill()
    return [f"process {one.pid}: {told}" for one, told in named]


def _alive(mark: str) -> Iterator[psutil.Process]:
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if one.status() != psutil.STATUS_ZOMBIE and one.environ().get(MARK) == mark:
                yield one


def carry_out(
    plan: Plan, *, limit_s: float, goes_on_s: float = GOES_ON_S, keep: Callable[[Path], None] | None = None
) -> Verdict:
    """One job, judged. Blocking. `keep` is told the folder of a bad one while it is there."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="elastickpt-chaos-") as top:
        folder = Path(top)
        led = Led(STAGES, plan.swap, microbatches=MICROBATCHES)
        jobs = [start(plan, folder, limit_s=limit_s)]
        bad = judged(plan, jobs[0], led, goes_on_s)
        if not plan.spares and not bad:
            jobs.append(start(replace(plan, faults=()), folder, limit_s=limit_s))
            bad = _judged_next(plan, jobs[1], led, folder)
        if not bad:
            bad = _checkpoints(folder, led)
        if bad and keep is not None:
            keep(folder)
    rungs = tuple(one["rung"] for job in jobs for event in job.recoveries() for one in event["lost"])
    losses = {note["step"]: note["loss"] for job in jobs for note in job.of("report")}
    waits = [wait for _, wait in _waits(jobs[0])]
    return Verdict(plan, bad, rungs, max(waits, default=0.0), time.monotonic() - began, tuple(sorted(losses.items())))


# -- what came of it


def judged(plan: Plan, job: Job, led: Led, goes_on_s: float) -> dict[str, str]:
    """What is bad of a plan's first start, by outcome."""
    bad: dict[str, str] = {}
    if job.code is None:
        bad["hang"] = f"no end; {job.said}"
    elif job.code != (0 if plan.spares else 75):
        bad["other"] = f"ended with {job.code}: {job.events[-1].get('why')}; {job.said}"
    elif not plan.spares and not str(job.events[-1]["why"]).startswith("no-spare"):
        bad["other"] = f"ended by {job.events[-1]['why']}"
    elif len(job.of("fault")) != len(plan.faults):
        bad["other"] = f"{len(job.of('fault'))} of {len(plan.faults)} faults were struck"
    late = [(number, wait) for number, wait in _waits(job) if wait > goes_on_s + plan.heartbeat_s * _stops(plan)]
    if late and plan.spares:
        bad["hang"] = "; ".join(f"{wait:.1f} s until the step behind {plan.faults[number]}" for number, wait in late)
    if why := _torn(plan, job, led):
        bad["torn"] = why
    if why := "; ".join(filter(None, (job.left, *_leaks(job)))):
        bad["leak"] = why
    return bad


def _stops(plan: Plan) -> bool:
    return any(fault.signal == signal.SIGSTOP for fault in plan.faults)


def _waits(job: Job) -> Iterator[tuple[int, float]]:
    """By fault, how long it took until a step was told of that was not completed before."""
    for fault in job.of("fault"):
        known = max((note["step"] for note in job.of("report") if note["at"] <= fault["at"]), default=0)
        later = [note["at"] for note in job.of("report") if note["at"] > fault["at"] and note["step"] > known]
        if later:
            yield fault["number"], min(later) - fault["at"]


def _torn(plan: Plan, job: Job, led: Led) -> str:
    """How what members had differs from what one process has."""
    try:
        for event in job.recoveries():
            told = [note["step"] for note in job.of("report") if note["generation"] < event["generation"]]
            led.recover(event, max(told, default=0))
        if plan.spares and job.code == 0:
            led.to(plan.until)
        else:
            led.to(max((note["step"] for note in job.of("report")), default=led.step))
    except (Astray, CheckpointError) as error:
        return f"{type(error).__name__}: {error}; {_differs(job, led)}"
    return _differs(job, led) or (_ends_apart(plan, job, led) if job.code == 0 else "")


def _differs(job: Job, led: Led) -> str:
    rolled_back = any(one["rung"] == "rollback" for event in job.recoveries() for one in event["lost"])
    for note in job.notes:
        where = f"stage {note.get('stage')} after step {note.get('step')}"
        if note["kind"] == "rebuilt" and led.rebuilt.get((note["generation"], note["stage"])) != note["digest"]:
            return f"{where}: another state behind the recovery of generation {note['generation']}"
        if note["kind"] == "report" and note["digest"] not in led.digests.get((note["stage"], note["step"]), ()):
            return f"{where}: another state"
        if note["kind"] == "report" and note["loss"] not in led.losses.get(note["step"], ()):
            return f"{where}: loss {note['loss']!r}, expected {led.losses.get(note['step'])}"
        if note["kind"] == "evaluated" and note["loss"] is None and rolled_back:
            continue
        if note["kind"] == "evaluated" and note["loss"] not in led.evaluated.get(note["step"], ()):
            return f"{where}: evaluated {note['loss']!r}, expected {led.evaluated.get(note['step'])}"
    return ""


def _ends_apart(plan: Plan, job: Job, led: Led) -> str:
    last = {note["stage"]: note for note in job.of("report")}
    for stage in range(STAGES):
        if stage not in last or (last[stage]["step"], last[stage]["digest"]) != (plan.until, led.digest(stage)):
            return f"stage {stage} did not end after step {plan.until} with the state of an undisturbed end"
    return ""


def _leaks(job: Job) -> Iterator[str]:
    for note in job.of("held"):
        more = {what: (note["bound"].get(what, 0), count) for what, count in note["found"].items()}
        more = {what: pair for what, pair in more.items() if pair[1] > pair[0]}
        if more:
            yield f"stage {note['stage']}, process {note['pid']}: {more}, threads {note['threads']}"


def _judged_next(plan: Plan, job: Job, led: Led, folder: Path) -> dict[str, str]:
    """The start behind an end without a spare goes on from the newest checkpoint."""
    first = min((note["step"] for note in job.of("report")), default=0)
    if job.code != 0 or not first:
        return {"other": f"the next start ended with {job.code}; {job.said}"}
    newest = max((fault.step for fault in plan.faults if fault.phase != "save"), default=0)
    if first - 1 < newest:
        return {"other": f"the next start went on from step {first - 1}, though step {newest} was saved"}
    try:
        led.begin_at(ek.open(f"{folder / 'run'}@{first - 1}").path)
        led.to(plan.until)
    except (Astray, CheckpointError) as error:
        return {"torn": f"{type(error).__name__}: {error}"}
    why = _differs(job, led) or _ends_apart(plan, job, led)
    return {"torn": f"the next start: {why}"} if why else {}


def _checkpoints(folder: Path, led: Led) -> dict[str, str]:
    """Each checkpoint of the run is whole, and is of one moment of the job."""
    for entry in history(folder / "run"):
        path = folder / "run" / entry.folder
        try:
            if problems := ek.open(path).verify().problems:
                return {"torn": f"{path.name}: {problems[0]}"}
            led.require_seen(str(path))
        except (Astray, CheckpointError) as error:
            return {"torn": f"{path.name}: {type(error).__name__}: {error}"}
    return {}
