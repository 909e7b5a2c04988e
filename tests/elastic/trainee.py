"""Trains the small model under `elastickpt-run`, with faults that were ordered, and notes what every member saw.

    trainee.py '{"folder": …, "until": 6, "swap": null, "faults": [[stage, step, phase], …], …}'

A fault of (stage, step, phase) happens once, on whoever holds the stage when the step after `step` completed ones is under way;
a second process at the place finds its mark in the folder and does nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import psutil
import torch

import elastickpt as ek
from elastickpt.elastic.passage import Passing
from elastickpt.saving.beside import SavesBeside
from tests.elastic.small_model import SEED, Corpus, build

TOLD = json.loads(sys.argv[1])
FOLDER = Path(TOLD["folder"])
ROOM = {
    "microbatches": 12,
    "earlier": [],
    "until": 6,
    "swap": None,
    "clip": 0.05,
    "scope": "stage",
    "every": 0,
    "evaluate": [],
    "behind": [],
    "pause": 0,
} | TOLD
EVALUATED = [Corpus().batch(900), Corpus().batch(901)]


class Faults:
    """What is to happen on this member. `phase` as in the marks: forward, backward, optimizer, boundary, evaluate, and with
    `raise-` before it an exception instead of a death; staged and handed-over, of the save of that step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.count = {"forward": 0, "backward": 0}

    def reached(self, phase: str, at: int | None = None) -> None:
        trainer = self.trainer
        if trainer is None:
            return
        for stage, step, what, *times in ROOM["faults"]:
            if (stage, step) != (trainer.place.stage, trainer.step if at is None else at) or what.removeprefix(
                "raise-"
            ) != phase:
                continue
            marks = [FOLDER / f"fault-{stage}-{step}-{what}-{number}" for number in range(*(times or [1]))]
            left = [mark for mark in marks if not mark.exists()]
            if left:
                left[0].touch()
                if what.startswith("raise-"):
                    raise ValueError(f"ordered: {what} at {step}")
                os.kill(os.getpid(), signal.SIGKILL)


def writers() -> list[int]:
    """The writer processes of this one."""
    return [one.pid for one in psutil.Process().children() if "writer" in " ".join(one.cmdline())]


def noted(trainer: Any, kind: str, **more: object) -> None:
    """A file with what this member has."""
    stage = trainer.stage
    state = {
        "model": {name: one.detach().clone() for name, one in stage.module.state_dict().items()},
        "optimizer": stage.optimizer.state_dict()["state"],
        "lr": [group["lr"] for group in stage.optimizer.param_groups],
        "step": trainer.step,
        **more,
    }
    number = len(list(FOLDER.glob(f"{kind}-{trainer.place.stage}-*")))
    torch.save(state, FOLDER / f"{kind}-{trainer.place.stage}-{number}")


def main() -> None:
    torch.set_num_threads(1)  # the backward of a norm sums by threads
    passing, faults = Passing(ROOM["microbatches"], swap=ROOM["swap"]), Faults()
    run = None
    if ROOM["every"]:
        options = ek.RunOptions(due=ek.Every(steps=ROOM["every"]), take_over=ROOM.get("take_over", False))
        run = ek.Run(ROOM.get("run", FOLDER / "run"), keep=ek.Keep(last=ROOM.get("keep")), options=options)

    def built(place: Any) -> ek.elastic.Stage:
        stage = build(place, passing, layers=ROOM.get("layers"))
        first = next(iter(stage.module.layers.values()))
        first.register_forward_pre_hook(lambda *_: faults.reached("forward" if first.training else "evaluate"))
        first.register_full_backward_hook(lambda *_: faults.reached("backward"))
        stage.optimizer.register_step_post_hook(lambda *_: faults.reached("optimizer"))
        return stage

    hand_over = SavesBeside._hand_over

    def handed_over(beside: SavesBeside, task: Any, share: Any) -> None:
        faults.reached("staged", task.request.step)
        hand_over(beside, task, share)
        faults.reached("handed-over", task.request.step)

    SavesBeside._hand_over = handed_over  # type: ignore[method-assign]
    with ek.elastic.join() as job:
        trainer = ek.elastic.PipelineTrainer(
            job,
            built,
            loader=Corpus(),
            microbatches=ROOM["microbatches"],
            swap=ROOM["swap"],
            clip=ROOM["clip"],
            clip_scope=ROOM["scope"],
            run=run,
            policy=ek.elastic.Policy(**ROOM.get("policy", {})),
            seed=SEED,
            on_rebuilt=lambda trainer, recovery: noted(
                trainer, "rebuilt", rung=recovery.rung, lost=[one.stage for one in recovery.lost]
            ),
        )
        faults.trainer = trainer
        trained(trainer, faults)


def trained(trainer: ek.elastic.PipelineTrainer, faults: Faults) -> None:
    """The earlier loops, and the last one; `evaluate` has the steps after which it evaluates within them, `behind` the ends of
    loops behind which it does so."""
    for until in (*ROOM["earlier"], ROOM["until"]):
        for report in trainer.steps(until):
            loss = trainer.evaluate(EVALUATED) if report.step in ROOM["evaluate"] else None
            recovered = [{"generation": one.generation, "seconds": asdict(one.seconds)} for one in report.recovered]
            about = {"loss": report.loss, "norms": dict(report.norms), "reported": report.step, "recovered": recovered}
            saved, began = None, time.monotonic()
            if report.saved is not None:
                error = report.saved.exception()
                saved = (type(error).__name__, time.monotonic() - began)
            if ROOM.get("note", True):
                noted(trainer, "report", evaluated=loss, saved=saved, writers=writers(), **about)
            (FOLDER / "begun").touch()
            time.sleep(ROOM["pause"])
            faults.reached("boundary")
        if until in ROOM["behind"]:
            noted(trainer, "behind", until=until, evaluated=trainer.evaluate(EVALUATED))


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        (FOLDER / f"raised-{os.getpid()}").write_text(f"{type(error).__name__}: {error}")
        raise
