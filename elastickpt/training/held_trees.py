"""Trees of values and tensors as values and held arrays: what an object of `state` has, and what is one rank's own.

Tensors become arrays of section `extra`, an ArrayReference stands in their place, all else is carried whole; `tree_binding` is
the way back. What is one rank's own by intent, `PerRank`, or because nothing says that another rank has the same, is a value:
small arrays stand in it, larger ones are arrays of that rank beside it.

    PerRank({"table": a numpy array of 1 MiB})   -> value {"table": {"$numpy": ...}} in this writer's per-rank values,
                                                     array extra/<item>/@rank<r>/table with the attribute `rank`

No other rank has a place for such an array, and none is asked for one. [UCF-111]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from operator import attrgetter
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy
import torch

from elastickpt.errors import ValueNotCarried
from elastickpt.format.arrays import DTYPES, ArrayId, ArraySpec
from elastickpt.format.many import many
from elastickpt.format.values import ArrayReference, Value
from elastickpt.format.version import MAX_SMALL_ARRAY_NBYTES
from elastickpt.training.composites import is_composite
from elastickpt.training.dtensors import Holders, JobView, LocalParts, hold, holders_of, local_parts, placed
from elastickpt.training.elements import dtype_name, lie_plainly, tensor_over
from elastickpt.training.held import HeldArray, Memo, SeenDict
from elastickpt.training.modules import hold_plain, hold_tensor
from elastickpt.training.parameters import Identities
from elastickpt.training.trees import (
    mapped,
    place_of,
    tokens,
)
from elastickpt.training.values import array_value, carried_leaf


@runtime_checkable
class Reshardable(Protocol):
    """An object that knows how its per-rank state is cut for another number of ranks."""

    def reshard(self, states: list[Value], rank: int, world_size: int) -> object:
        """The state for `rank` of `world_size` ranks, from those of all ranks that saved, in their order.

        Called before anything is loaded, so it must not change the object: the result goes to `load_state_dict` later.
        """
        ...


class PerRank:
    """Marks an entry of `state` as this rank's own: each rank's is saved, and comes back to the rank that saved it.

    It is not compared between ranks. On another layout the object's own `reshard(states, rank, world_size)` is asked, see
    `Reshardable`; without one loading is refused, naming the entry.

    Args:
        value: An object with `state_dict` and `load_state_dict`, or a plain value or container. Tensors inside are carried
            whole. A plain value that cannot be changed in place (a number) is replaced in `value`.

    Examples:
        >>> position = ek.PerRank({"file": 3, "offset": 1200})
        >>> info = ek.save({"position": position}, "out/position")
        >>> position.value["offset"] = 0
        >>> report = ek.load({"position": position}, "out/position")
        >>> position.value
        {'file': 3, 'offset': 1200}
    """

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


RANK = "rank"


def is_large(value: object) -> bool:
    """Whether a tensor or an array of numpy is too large, or of too many parts, to stand inside a value."""
    if isinstance(value, torch.Tensor):
        return is_composite(value) or (value.numel() * value.element_size() > MAX_SMALL_ARRAY_NBYTES and placed(value) is None)
    return isinstance(value, numpy.ndarray) and value.nbytes > MAX_SMALL_ARRAY_NBYTES and value.dtype.name in DTYPES


def as_tensor(value: object) -> torch.Tensor:
    """A large tensor itself, or a tensor over the memory of a large array of numpy."""
    return value if isinstance(value, torch.Tensor) else tensor_over(value)  # type: ignore[arg-type]


def own_holders(job: JobView) -> Holders:
    """Nobody but this rank."""
    return Holders("declared", (job.rank,))


def hold_own(item: str, value: object, *, place: str, job: JobView) -> tuple[Value, Sequence[HeldArray]]:
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


class Stateful(Protocol):
    """What schedulers, loaders, scalers and the like offer."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def is_stateful(value: object) -> TypeGuard[Stateful]:
    """Whether an entry of `state` is an object that gives and takes its state."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def hold_tree(
    item: str, value: object, *, place: str, job: JobView, identities: Identities
) -> tuple[Value, tuple[HeldArray, ...]]:
    """The tree of `value`, which stands at `place` below `item`, and its tensors.

    Raises ValueNotCarried with the places of all that no checkpoint can hold.
    """
    arrays: list[HeldArray] = []
    refused: list[ValueNotCarried] = []
    above = len(place_of(item)) + 1

    def leaf(one: object, where: str) -> Value:
        if not isinstance(one, torch.Tensor) and not is_large(one):
            try:
                return carried_leaf(one, where)
            except ValueNotCarried as error:
                refused.append(error)
                return None
        name = where[above:]
        arrays.extend(hold_tensor(item, name, as_tensor(one), job=job, identities=identities))
        return ArrayReference(item, name, "torch" if isinstance(one, torch.Tensor) else "numpy")

    def whole(one: object, where: str) -> Value:
        if job.memo is None or type(one) is not dict or set(map(type, one)) != {str}:
            return None
        parts = local_parts(tuple(one.values()))
        if parts is None:
            return None
        tree, held = _hold_dict(item, one, parts, (where, where[above:]), job=job, memo=job.memo, identities=identities)
        arrays.extend(held)
        return tree

    tree = mapped(value, place, leaf, whole=whole)
    if refused:
        others = [error.message.partition(";")[0] for error in refused[1:MAX_NAMED]]
        more = f"; and {len(refused) - MAX_NAMED} more" if len(refused) > MAX_NAMED else ""
        raise ValueNotCarried("; also ".join((refused[0].message, *others)) + more)
    return tree, tuple(arrays)


def _hold_dict(
    item: str,
    value: dict[str, torch.Tensor],
    parts: LocalParts,
    where: tuple[str, str],
    *,
    job: JobView,
    memo: Memo,
    identities: Identities,
) -> tuple[Value, Sequence[HeldArray]]:
    """A dict of plain tensors, or of DTensors, at a place, and at a name below `item`: in columns, if it stood there in the
    capture before."""
    (place, below), tensors, holders = where, tuple(value.values()), holders_of(job)
    alike, new = (holders.sharing, holders.ranks, holders.kept), identities.are_new(tensors)
    seen = memo.find_dict(place, tuple(value))
    if seen is not None and new:
        held = seen.again(parts.tensors, alike, parts.cause)
        if held is not None:
            identities.add_all(item, [one.id.name for one in seen.specs], tensors, held.__getitem__, holders)
            memo.put_dict(place, seen)
            return seen.tree, held
    names = [f"{below}/{name}" if below else name for name in tokens(tuple(value))]
    references = many(ArrayReference, len(names), item=repeat(item), name=names, origin=repeat("torch"))
    tree: dict[str, Value] = dict(zip(value, references, strict=True))
    dtypes = [dtype_name(one.dtype) or "" for one in parts.tensors]
    plainly = new and all(dtypes) and lie_plainly(parts.tensors)
    if plainly and not parts.cause:
        shapes = list(map(tuple, map(attrgetter("shape"), tensors)))
        specs = _specs_of(item, names, shapes, dtypes)
        held = hold_plain(item, tensors, specs, job=job, identities=identities)
        memo.put_dict(place, SeenDict.of(tree, held, tensors, alike, ()))
        return tree, held
    each = [hold_tensor(item, name, one, job=job, identities=identities) for name, one in zip(names, tensors, strict=True)]
    held = [one for own in each for one in own]
    if plainly and all(len(own) == 1 for own in each):  # none for a rank outside the mesh
        memo.put_dict(place, SeenDict.of(tree, held, parts.tensors, alike, parts.cause))
    return tree, held


def _specs_of(item: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str]) -> list[ArraySpec]:
    """Those of arrays of an item; each sort of them is looked at. Raises LimitExceeded."""
    ids = many(ArrayId, len(names), section=repeat("extra"), item=repeat(item), name=names, state=repeat(""))
    for (shape, dtype), id_ in dict(zip(zip(shapes, dtypes, strict=True), ids, strict=True)).items():
        ArraySpec(id_, shape, dtype)
    return many(ArraySpec, len(names), id=ids, shape=shapes, dtype=dtypes)


MAX_NAMED = 20  # of the values that one error names
