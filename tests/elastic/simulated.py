"""The same job by one process: its steps, and what its losses are to do to it, by the formulas of the specification."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from elastickpt.elastic.gradients import divide
from elastickpt.elastic.passage import Passing
from tests.elastic.small_model import Corpus, Sequential

Tensors = dict[str, Tensor]


class Simulated:
    """`norms`: of each stage's body in the last step, after clipping."""

    def __init__(self, stages: int, passing: Passing, *, clip: float, layers: int | None = None) -> None:
        self.reference, self.clip, self.step = Sequential(stages, passing, layers=layers), clip, 0
        self.norms: list[float] = []
        self.factors = [1.0] * stages

    def take_step(self) -> float:
        """The loss."""
        losses = self.reference.gradients(self.step, Corpus().batch(self.step))
        self.reference.sum_replicas()
        self.norms = []
        for number, stage in enumerate(self.reference.stages):
            divide(stage.module.parameters(), self.reference.passing.microbatches)
            for part in ("embed", "body", "head"):
                clip_grad_norm_(stage.parameters(part), self.clip)
            self.norms.append(get_total_norm([one.grad for one in stage.parameters("body")]).item())
            self._step_optimizer(number)
            stage.scheduler.step()
            stage.module.zero_grad()
        self.step += 1
        return sum(losses) / len(losses)

    def _step_optimizer(self, number: int) -> None:
        """The body's learning rate has the stage's factor, that of embedding and head is the scheduler's."""
        stage, factor = self.reference.stages[number], self.factors[number]
        optimizer = stage.optimizer
        (group,) = optimizer.param_groups
        body = {id(one) for one in stage.parameters("body")}
        whole = group["params"]
        group["params"] = [one for one in whole if id(one) not in body]
        rest = {**group, "params": [one for one in whole if id(one) in body], "lr": group["lr"] * factor}
        optimizer.param_groups.append(rest)
        optimizer.step()
        optimizer.param_groups.pop()
        group["params"] = whole

    def average(self, lost: int, *, moments: bool = False, factor: float = 1.1) -> None:
        """CheckFree, in numpy; `moments` likewise, or none. [REC-1, REC-4, REC-58]"""
        before, after = (list(self.bodies(stage).values()) for stage in (lost - 1, lost + 1))
        x, y = self.norms[lost - 1], self.norms[lost + 1]
        alpha = (x + 1e-4) / ((x + y) + 2 * 1e-4)
        self._put_body(lost, [mixed(b, a, alpha) for b, a in zip(before, after, strict=True)])
        self.factors[lost] = factor
        one, middle, other = (self.reference.stages[stage] for stage in (lost - 1, lost, lost + 1))
        if moments:
            for parameter, b, a in zip(*(stage.parameters("body") for stage in (middle, one, other)), strict=True):
                states = one.optimizer.state[b], other.optimizer.state[a]
                found = {key: mixed(value, states[1][key], alpha) for key, value in states[0].items() if key != "step"}
                middle.optimizer.state[parameter] = {"step": states[0]["step"].clone(), **found}

    def copy(self, lost: int, partner: int) -> None:
        self._put_body(lost, [one.detach().clone() for one in self.bodies(partner).values()])

    def _put_body(self, lost: int, made: list[Tensor]) -> None:
        stage = self.reference.stages[lost]
        with torch.no_grad():
            for mine, one in zip(self.bodies(lost).values(), made, strict=True):
                mine.copy_(one)
        for parameter in stage.parameters("body"):
            stage.optimizer.state.pop(parameter, None)
        self.factors[lost] = 1.1

    def bodies(self, number: int) -> Tensors:
        stage = self.reference.stages[number]
        return {name: one for name, one in stage.module.state_dict(keep_vars=True).items() if name.startswith("layers")}

    def state(self, number: int) -> dict[str, Any]:
        stage = self.reference.stages[number]
        return {
            "model": {name: one.detach().clone() for name, one in stage.module.state_dict().items()},
            "optimizer": copy.deepcopy(stage.optimizer.state_dict()["state"]),
            "lr": [group["lr"] for group in stage.optimizer.param_groups],
            "step": self.step,
        }


def mixed(before: Tensor, after: Tensor, alpha: float) -> Tensor:
    if not before.is_floating_point():
        return before.clone()
    made = np.float32(alpha) * before.detach().numpy() + np.float32(1.0 - alpha) * after.detach().numpy()
    return torch.from_numpy(np.asarray(made))
