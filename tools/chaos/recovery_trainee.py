"""Trains the small model of the tests under `elastickpt-run`, in two loops; members strike at ordered moments, and note what
they have.

    recovery_trainee.py PLAN                a `recovery_plans.Plan` as JSON

Whoever reaches the moment first strikes all victims, itself last; each fault happens once in a job. What members note are lines
of JSON in a file of each process.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import psutil
import torch

import elastickpt as ek
from elastickpt.elastic import tasks
from elastickpt.elastic.membership import Computed
from elastickpt.elastic.passage import Passing
from elastickpt.errors import CheckpointError
from tests.elastic.small_model import SEED, Corpus, build
from tools.chaos.recovery_model import CLIP, digest_of, state_of

PLAN = json.loads(sys.argv[1])
FOLDER = Path(PLAN["folder"])
NOTES = os.open(FOLDER / f"notes-{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
SETTLE_S = 20.0
TIMED = {"save": 0.001, "form": 0.004}  # somewhere in them: seconds behind their beginning, for each of a fault's `nth`


def note(kind: str, **told: object) -> None:
    os.write(NOTES, json.dumps({"kind": kind, "at": time.monotonic(), "pid": os.getpid(), **told}).encode() + b"\n")


class Faults:
    """What is to happen, and how often this member has come to each point of its step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.job: Any = None
        self._times: Counter[tuple[str, int]] = Counter()

    def reached(self, phase: str, *, step: int | None = None) -> None:
        """Strikes, where that was ordered. `step`: completed ones, by default the trainer's."""
        if self.trainer is None:
            return
        step, stage = self.trainer.step if step is None else step, self.job.rank
        self._times[phase, step] += 1
        for number, fault in enumerate(PLAN["faults"]):
            mine = (fault["phase"], fault["step"]) == (phase, step) and stage in fault["stages"]
            times = 0 if phase in TIMED else fault["nth"]
            if mine and self._times[phase, step] > times and self._first_at(number, fault):
                self._strike(number, fault)

    def ordered(self, phase: str, step: int) -> bool:
        return any((fault["phase"], fault["step"]) == (phase, step) for fault in PLAN["faults"])

    def _first_at(self, number: int, fault: dict[str, Any]) -> bool:
        if fault["after"] is not None and not (FOLDER / f"struck-{fault['after']}").exists():
            return False
        try:
            os.close(os.open(FOLDER / f"struck-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _strike(self, number: int, fault: dict[str, Any]) -> None:
        if fault["phase"] in TIMED and fault["nth"]:
            threading.Timer(TIMED[fault["phase"]] * fault["nth"], self._kill, (number, fault)).start()
        else:
            self._kill(number, fault)

    def _kill(self, number: int, fault: dict[str, Any]) -> None:
        note("fault", number=number)
        others = [stage for stage in fault["stages"] if stage != self.job.rank]
        for stage in others:
            os.kill(int((FOLDER / f"holder-{stage}").read_text()), fault["signal"])
        os.kill(os.getpid(), fault["signal"])


def around(owner: Any, name: str, before: Callable[[Any], None], after: Callable[[Any], None]) -> None:
    """Calls `before` and `after` of the last argument around a method."""
    method = getattr(owner, name)

    def called(*given: Any, **options: Any) -> Any:
        before(given[-1])
        found = method(*given, **options)
        after(given[-1])
        return found

    setattr(owner, name, called)


def watch(faults: Faults, job: Any) -> None:
    """Points of a member's work that a script of a user does not see."""

    def decided(outcome: object) -> None:
        if isinstance(outcome, Computed):
            faults.reached("decided")

    def mend(act: Any) -> None:
        faults.reached("mend", step=act.view.step)

    def form(act: Any) -> None:
        if act.view.generation > 1:
            faults.reached("form", step=act.view.step)

    around(job, "done", lambda _: None, decided)
    around(tasks.Tasks, "_mend", mend, mend)
    around(tasks.Tasks, "_form", form, form)


def held() -> dict[str, int]:
    """What this process holds, of what must not grow; stage 0 speaks for the launcher and the process that forks, too."""
    descriptors = os.listdir("/proc/self/fd")
    kinds: Counter[str] = Counter()
    for one in descriptors:
        try:
            kinds[os.readlink(f"/proc/self/fd/{one}").partition(":")[0].partition("-")[0]] += 1
        except FileNotFoundError:
            continue  # that of the listing
    mapped = sum("memfd:" in line for line in Path("/proc/self/maps").read_text().splitlines())
    return {"threads": len(os.listdir("/proc/self/task")), "descriptors": len(descriptors), "mapped": mapped} | {
        f"of {kind}": count for kind, count in kinds.items() if kind in ("socket", "/memfd")
    }


def held_by_launcher() -> dict[str, int]:
    zygote = psutil.Process().parent()
    launcher = None if zygote is None else zygote.parent()
    named = {"launcher": launcher, "zygote": zygote}
    return {f"{name}'s descriptors": one.num_fds() for name, one in named.items() if one is not None}


def settled(bound: dict[str, int]) -> dict[str, int]:
    """What is held once it is no more than the bound, or after a while."""
    until, found = time.monotonic() + SETTLE_S, held()
    while any(found[what] > bound.get(what, 0) for what in found) and time.monotonic() < until:
        time.sleep(0.05)
        found = held()
    return found


def main() -> None:
    torch.set_num_threads(1)  # the backward of a norm sums by threads
    passing, faults = Passing(PLAN["microbatches"], swap=PLAN["swap"]), Faults()
    run = ek.Run(FOLDER / "run", options=ek.RunOptions(due=ek.Every(steps=PLAN["every"])))

    def built(place: Any) -> ek.elastic.Stage:
        (FOLDER / f"holder-{place.stage}").write_text(f"{os.getpid()}")
        stage = build(place, passing)
        layers: Any = stage.module.layers
        first = next(iter(layers.values()))
        first.register_forward_pre_hook(lambda *_: faults.reached("forward" if first.training else "evaluate"))
        first.register_full_backward_hook(lambda *_: faults.reached("backward"))
        stage.optimizer.register_step_pre_hook(lambda *_: faults.reached("optimizer"))
        stage.optimizer.register_step_post_hook(lambda *_: faults.reached("optimizer"))
        return stage

    def rebuilt(trainer: Any, recovery: Any) -> None:
        told = {"generation": recovery.generation, "digest": digest_of(state_of(trainer.stage))}
        note("rebuilt", stage=trainer.place.stage, step=trainer.step, **told)

    with ek.elastic.join() as job:
        watch(faults, job)
        trainer = ek.elastic.PipelineTrainer(
            job,
            built,
            loader=Corpus(),
            microbatches=PLAN["microbatches"],
            swap=PLAN["swap"],
            clip=CLIP,
            run=run,
            policy=ek.elastic.Policy(**PLAN["policy"]),
            seed=SEED,
            on_rebuilt=rebuilt,
        )
        faults.trainer, faults.job = trainer, job
        bound: dict[str, int] = {}
        saved = 0
        for until in (PLAN["until"] // 2, PLAN["until"]):
            for report in trainer.steps(until):
                step, stage = report.step, trainer.place.stage
                digest = digest_of(state_of(trainer.stage))
                note("report", stage=stage, step=step, generation=job.generation, loss=report.loss, digest=digest)
                if report.saved is not None:
                    faults.reached("save")
                    if not faults.ordered("save", step):
                        try:
                            report.saved.result()
                            saved += 1
                            bound = held() if saved == 2 else bound
                        except CheckpointError as error:
                            note("not saved", stage=stage, step=step, why=str(error))
                if PLAN["evaluates"]:
                    loss = trainer.evaluate([Corpus().batch(900)])
                    note("evaluated", stage=stage, step=step, loss=None if math.isnan(loss) else loss)
            if PLAN["evaluates"] and not math.isnan(loss := trainer.evaluate([Corpus().batch(900)])):
                note("evaluated", stage=trainer.place.stage, step=trainer.step, loss=loss)
        if saved > 2:
            note("held", stage=trainer.place.stage, bound=bound, found=settled(bound), threads=_names())
        if job.rank == 0:
            note("held by launcher", found=held_by_launcher())


def _names() -> list[str]:
    return [one.name for one in threading.enumerate()]


if __name__ == "__main__":
    main()
