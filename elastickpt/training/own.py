"""What is one rank's own, as a value: small arrays stand in it, larger ones are arrays of that rank beside it.

    PerRank({"table": a numpy array of 1 MiB})   -> value {"table": {"$numpy": ...}} in this writer's per-rank values,
                                                     array extra/<item>/@rank<r>/table with the attribute `rank`

No other rank has a place for such an array, and none is asked for one. [UCF-111]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch

from elastickpt.format.arrays import DTYPES, ArrayId
from elastickpt.format.limits import MAX_SMALL_ARRAY_NBYTES
from elastickpt.format.values import ArrayReference, Value
from elastickpt.training.composites import is_composite
from elastickpt.training.dtensors import Holders, Job, hold, placed
from elastickpt.training.held import HeldArray
from elastickpt.training.memory import tensor_over
from elastickpt.training.trees import mapped, place_of
from elastickpt.training.values import array_value, carried_leaf

RANK = "rank"


def is_large(value: object) -> bool:
    """Whether a tensor or an array of numpy is too large, or of too many parts, to stand inside a value."""
    if isinstance(value, torch.Tensor):
        return is_composite(value) or (value.numel() * value.element_size() > MAX_SMALL_ARRAY_NBYTES and placed(value) is None)
    return isinstance(value, numpy.ndarray) and value.nbytes > MAX_SMALL_ARRAY_NBYTES and value.dtype.name in DTYPES


def as_tensor(value: object) -> torch.Tensor:
    """A large tensor itself, or a tensor over the memory of a large array of numpy."""
    return value if isinstance(value, torch.Tensor) else tensor_over(value)  # type: ignore[arg-type]


def own_holders(job: Job) -> Holders:
    """Nobody but this rank."""
    return Holders("declared", (job.rank,))


def hold_own(item: str, value: object, *, place: str, job: Job) -> tuple[Value, Sequence[HeldArray]]:
    """A rank's own value, which stands at `place` below `item`, and the arrays beside it.

    Raises ValueNotCarried with the place.
    """
    arrays: list[HeldArray] = []
    above = len(place_of(item))

    def leaf(one: object, where: str) -> Value:
        if not is_large(one):
            return carried_leaf(one, where)
        name = f"@rank{job.rank}{where[above:]}"
        held = hold(ArrayId("extra", item, name, ""), as_tensor(one), role="other", job=job, holders=own_holders(job))
        arrays.extend(replace(each, attributes=(*each.attributes, (RANK, job.rank))) for each in held)
        return ArrayReference(item, name, "torch" if isinstance(one, torch.Tensor) else "numpy")

    return mapped(value, place, leaf), arrays


def in_memory(value: object, place: str) -> Value:
    """A plain value with arrays of any size in it, for this process only. Raises ValueNotCarried as `carried` does."""

    def leaf(one: object, where: str) -> Value:
        if not is_large(one) or (isinstance(one, torch.Tensor) and is_composite(one)):
            return carried_leaf(one, where)
        return replace(array_value(as_tensor(one)), origin="torch" if isinstance(one, torch.Tensor) else "numpy")

    return mapped(value, place, leaf)
