"""The job that is killed, by one process: its steps, and what its recoveries must have made of it, by the specification.

Led by the events of a job, it says bit for bit what every stage has after each step and behind each recovery. [REC-4, REC-58]
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn

import elastickpt as ek
from elastickpt.elastic.passage import Passing
from tests.elastic.simulated import Simulated
from tests.elastic.small_model import Corpus, build

CLIP = 0.05
Event = Mapping[str, Any]


class Astray(Exception):
    """An event says what no recovery may do."""


def state_of(stage: Any) -> dict[str, Any]:
    """What a stage has, of which a digest is told."""
    return {
        "model": stage.module.state_dict(),
        "optimizer": stage.optimizer.state_dict()["state"],
        "lr": [group["lr"] for group in stage.optimizer.param_groups],
    }


def digest_of(value: object) -> str:
    """The same for the same values, bit for bit."""
    digest = xxhash.xxh3_64()
    _take(digest, value)
    return str(digest.hexdigest())


def _take(digest: Any, value: object) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            _take(digest, value[key])
    elif isinstance(value, list | tuple):
        for one in value:
            _take(digest, one)
    else:
        digest.update(repr(value).encode())


class Led:
    """`digests` by (stage, step): every state that a stage may be seen with after that many steps; `losses` by step, more than
    one where a rollback took it twice; `rebuilt` by generation and stage."""

    def __init__(self, stages: int, swap: Any, *, microbatches: int) -> None:
        torch.set_num_threads(1)  # as the members have: the backward of a norm sums by threads
        self.job = Simulated(stages, Passing(microbatches, swap=swap), clip=CLIP)
        self.stages, self.microbatches = stages, microbatches
        self.digests: dict[tuple[int, int], set[str]] = {}
        self.losses: dict[int, set[float]] = {}
        self.evaluated: dict[int, set[float]] = {}
        self.rebuilt: dict[tuple[int, int], str] = {}
        self._stand()

    @property
    def step(self) -> int:
        return self.job.step

    def to(self, step: int) -> None:
        """Steps that nothing disturbs."""
        while self.job.step < step:
            loss = self.job.take_step()
            self.losses.setdefault(self.job.step, set()).add(loss)
            self._stand()

    def begin_at(self, path: str) -> None:
        """A next start, from a checkpoint. Raises Astray."""
        self._roll_back(path)
        self._stand()

    def recover(self, event: Event, reached: int) -> None:
        """What an event of a recovery says; `reached` is the newest step that anybody told of before it. Raises Astray."""
        self.to(max(self.step, reached))
        back = next((one["from"] for one in event["lost"] if one["rung"] == "rollback"), None)
        if back is None:
            if event["step"] < self.step:
                raise Astray(f"step {event['step']} behind step {self.step} without a rollback")
            self.to(event["step"])
            lost = {one["stage"] for one in event["lost"] if one["rung"] != "replay"}
            for one in event["lost"]:
                self._mend(one, lost)
        else:
            self._roll_back(back["path"])
        if self.step != event["step"]:
            raise Astray(f"all are said to stand after step {event['step']}, and the checkpoint is of step {self.step}")
        self._stand()
        for stage in range(self.stages):
            self.rebuilt[event["generation"], stage] = self.digest(stage)

    def require_seen(self, path: str) -> None:
        """All stages of a checkpoint are as they were seen after its step. Raises Astray."""
        for number in range(self.stages):
            self._read(number, path)

    def evaluate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """What an evaluation gives now."""
        means = []
        for inputs, targets in batches:
            losses = []
            for chunk, target in zip(inputs.chunk(self.microbatches), targets.chunk(self.microbatches), strict=True):
                hidden = chunk
                with torch.no_grad():
                    for stage in self.job.reference.stages:
                        stage.module.eval()
                    for position, stage in enumerate(self.job.reference.stages):
                        wanted = ["embed"] * (position == 0) + ["body"] + ["head"] * (position == self.stages - 1)
                        for part in (module for name, module in stage.parts.items() if name in wanted):
                            hidden = part(hidden)
                    for stage in self.job.reference.stages:
                        stage.module.train()
                losses.append(float(nn.functional.cross_entropy(hidden, target).double()))
            means.append(sum(losses) / len(losses))
        return sum(means) / len(means)

    def _mend(self, lost: Mapping[str, Any], away: set[int]) -> None:
        stage, source = lost["stage"], lost["from"]
        if lost["rung"] == "checkfree":
            if source["stages"] != [stage - 1, stage + 1] or away & set(source["stages"]):
                raise Astray(f"stage {stage} is made of {source['stages']}, while {sorted(away)} are lost")
            x, y = self.job.norms[stage - 1], self.job.norms[stage + 1]
            if source["alpha"] != (x + 1e-4) / ((x + y) + 2 * 1e-4):
                raise Astray(f"stage {stage}: alpha {source['alpha']} of norms {x} and {y}")
            self.job.average(stage)
        elif lost["rung"] == "partner":
            (other,) = source["stages"]
            if other in away or {stage, other} not in ({0, 1}, {self.stages - 2, self.stages - 1}):
                raise Astray(f"stage {stage} is a copy of {other}, while {sorted(away)} are lost")
            self.job.copy(stage, other)
        elif lost["rung"] == "stale":
            self._stale(stage, source["path"], away)

    def _stale(self, number: int, path: str, away: set[int]) -> None:
        """The body as the checkpoint has it; embedding and head too, unless a replica of them lives."""
        pairs = [] if self.job.reference.passing.swap is None else [(0, 1), (self.stages - 2, self.stages - 1)]
        twin = next((b if a == number else a for a, b in pairs if number in (a, b)), None)
        mine, saved = self.job.reference.stages[number], self._read(number, path)
        parts = [part for part in mine.parts if part == "body" or twin is None or twin in away]
        for part in parts:
            for name, tensor in mine.tensors[part].items():
                tensor.data.copy_(saved.tensors[part][name].data)
            for one, other in zip(mine.parameters(part), saved.parameters(part), strict=True):
                mine.optimizer.state.pop(one, None)
                if other in saved.optimizer.state:
                    mine.optimizer.state[one] = copy.deepcopy(saved.optimizer.state[other])
        self.job.factors[number] = self._factors(path)[number]

    def _roll_back(self, path: str) -> None:
        for number, stage in enumerate(self.job.reference.stages):
            saved = self._read(number, path)
            stage.module.load_state_dict(saved.module.state_dict())
            stage.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
            assert stage.scheduler is not None
            stage.scheduler.load_state_dict(saved.scheduler.state_dict())
        norms = _history(path)["norms"]
        self.job.step, self.job.factors = ek.open(path).step or 0, self._factors(path)
        self.job.norms = [norms[str(stage)] for stage in range(self.stages)]

    def _read(self, number: int, path: str) -> Any:
        """A stage as a checkpoint has it: as it was seen after that step. Raises Astray."""
        stage = build(self.job.reference.places[number], self.job.reference.passing)
        state = {"model": stage.module, "optimizer": stage.optimizer, "scheduler": stage.scheduler}
        step = ek.elastic.load_alone(state, path).step or 0
        if digest_of(state_of(stage)) not in self.digests.get((number, step), ()):
            raise Astray(f"stage {number} of {path} is nothing that the stage was after step {step}")
        return stage

    def _factors(self, path: str) -> list[float]:
        """By stage: those of its first body parameter."""
        told = _history(path)["lr_factors"]
        stages = self.job.reference.stages
        return [told.get(next(iter(stage.tensors["body"])), 1.0) for stage in stages]

    def _stand(self) -> None:
        for stage in range(self.stages):
            self.digests.setdefault((stage, self.step), set()).add(self.digest(stage))
        batches = [Corpus().batch(900)]
        self.evaluated.setdefault(self.step, set()).add(self.evaluate(batches))

    def digest(self, stage: int) -> str:
        """Of what a stage has now."""
        return digest_of(state_of(self.job.reference.stages[stage]))


def _history(path: str) -> Mapping[str, Any]:
    """What a checkpoint says of the job."""
    found: Any = ek.open(path).values["/elastic"]
    return cast("Mapping[str, Any]", found)
