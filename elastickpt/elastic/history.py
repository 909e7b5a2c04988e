"""What is known of a whole job beside its tensors, the same on every member: factors of learning rates, norms, what was mended.

A checkpoint holds it as its item `elastic`. Who takes a lost place hears it from the members that stand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from elastickpt.elastic.recovery import Recovery
from elastickpt.elastic.stages import Stage

log = logging.getLogger(__name__)

MendedEntry = dict[str, int | str | bool]


class History(msgspec.Struct):
    """`lr_factors` by parameter name, those of 1 left out; `norms` by stage, of the last committed step; `lineage`: one entry
    for each stage that was rebuilt on this branch, oldest first."""

    seed: int = 0
    lr_factors: dict[str, float] = {}
    norms: dict[int, float] = {}
    lineage: list[MendedEntry] = []

    def state_dict(self) -> dict[str, object]:
        return {
            "seed": self.seed,
            "lr_factors": dict(self.lr_factors),
            "norms": {str(stage): norm for stage, norm in self.norms.items()},
            "lineage": [dict(one) for one in self.lineage],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seed = int(state.get("seed", self.seed))
        self.lr_factors = {str(name): float(factor) for name, factor in state.get("lr_factors", {}).items()}
        self.norms = {int(stage): float(norm) for stage, norm in state.get("norms", {}).items()}
        self.lineage = [dict(one) for one in state.get("lineage", [])]

    def goes_on(self, seed: int) -> None:
        """The streams are drawn from this seed from now on, whatever a checkpoint says."""
        if self.seed != seed:
            log.warning("the checkpoint was trained with seed=%d; from here on it is seed=%d", self.seed, seed)
            self.seed = seed

    def mended(self, recovery: Recovery) -> None:
        """Notes what a recovery made of lost stages; a replay, and a rollback, leave no trace in the state."""
        self.lineage += [
            {"step": recovery.step, "stage": one.stage, "rung": one.rung, "generation": recovery.generation}
            for one in recovery.lost
            if one.rung not in ("replay", "rollback")
        ]

    def put_factors(self, names: Iterable[str], factors: Mapping[str, float]) -> None:
        """From now on these names have these factors; 1 where none is given."""
        for name in names:
            factor = factors.get(name, 1.0)
            if factor == 1.0:
                self.lr_factors.pop(name, None)
            else:
                self.lr_factors[name] = factor


@contextmanager
def scaled(stage: Stage, factors: Mapping[str, float]) -> Iterator[None]:
    """In here the optimizer's learning rates are what its groups say, times the factor of each parameter.

    A group whose parameters have several factors is as many groups meanwhile; what the optimizer writes into one of them is
    kept. Afterwards groups and learning rates are what the scheduler left.
    """
    mine = {name: tensor for tensors in (stage.tensors.values() if factors else ()) for name, tensor in tensors.items()}
    by_tensor = {id(tensor): factors[name] for name, tensor in mine.items() if name in factors}
    if not by_tensor:
        yield
        return
    optimizer = stage.optimizer
    groups, rates = list(optimizer.param_groups), [group["lr"] for group in optimizer.param_groups]
    apart = [_apart(group, by_tensor) for group in groups]
    optimizer.param_groups[:] = [part for parts in apart for part in parts]
    try:
        yield
    finally:
        for group, rate, parts in zip(groups, rates, apart, strict=True):
            written = {key: value for key, value in parts[0].items() if key not in ("params", "lr")}
            group.update(written)
            group["lr"] = rate
        optimizer.param_groups[:] = groups


def _apart(group: dict[str, Any], by_tensor: Mapping[int, float]) -> Sequence[dict[str, Any]]:
    found = [by_tensor.get(id(one), 1.0) for one in group["params"]]
    different = list(dict.fromkeys(found))
    if len(different) == 1:
        group["lr"] = group["lr"] * different[0]
        return [group]
    return [
        {
            **group,
            "params": [one for one, factor in zip(group["params"], found, strict=True) if factor == wanted],
            "lr": group["lr"] * wanted,
        }
        for wanted in different
    ]
