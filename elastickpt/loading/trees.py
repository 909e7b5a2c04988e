"""A saved tree of `state` as plain values and arrays again: what `Checkpoint.tree` gives. Imports torch only where asked.

An entry that was a dict, a list, a tensor, or an object with `state_dict` stands in the checkpoint as a tree of values, with a
reference where each large array stood. Here the containers are those that were saved, and arrays numpy's or torch's.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from elastickpt.errors import NotACheckpoint, Refused, StateMismatch
from elastickpt.format.arrays import ArrayId, Box
from elastickpt.format.encode_values import pointer_token
from elastickpt.format.values import ArrayReference, ArrayValue, DeviceValue, DtypeValue, NamedTupleValue, Value

if TYPE_CHECKING:
    from elastickpt.loading.checkpoint import Checkpoint

ArrayKind = Literal["numpy", "torch"]
_KINDS: Mapping[str, str] = {
    "module": "a module, whose arrays are in `parameters`; ek.load fills one with them",
    "optimizer": "an optimizer, whose arrays are in `parameters` and settings in `tables`; ek.load fills one with them",
}


def tree_of(checkpoint: Checkpoint, item: str, *, arrays: ArrayKind, rank: int | None) -> object:
    """What stood in `state` under `item`, as `Checkpoint.tree` says."""
    if arrays not in ("numpy", "torch"):
        raise Refused(f"arrays {arrays!r}: expected 'numpy' or 'torch'")
    kinds = {one.name: one.kind for one in checkpoint.items}
    if item not in kinds:
        known = ", ".join(map(repr, kinds)) or "nothing"
        raise NotACheckpoint(f"{checkpoint.path}: expected {item!r} among what was saved, found {known}")
    if kinds[item] in _KINDS:
        raise Refused(f"{checkpoint.path}: {item!r} is {_KINDS[kinds[item]]}")
    for table in checkpoint.tables:
        for field in table.fields:
            if field.kind == "schedule" and field.key.partition("/")[0] == pointer_token(item):
                raise Refused(
                    f"{checkpoint.path}: {item!r} is a scheduler, whose {field.key.partition('/')[2]} stands by parameter in "
                    f"`tables`, as {table.item!r}; ek.load fills a scheduler with it"
                )
    made = _Arrays(checkpoint, arrays)
    return _built(_value(checkpoint, item, rank), made.leaf)


def _value(checkpoint: Checkpoint, item: str, rank: int | None) -> Value:
    pointer = f"/{pointer_token(item)}"
    if pointer in checkpoint.values:
        return checkpoint.values[pointer]
    ranks = checkpoint.manifest.world_size
    if rank is None and ranks > 1:
        raise Refused(f"{checkpoint.path}: {item!r} is each rank's own: expected rank=, from 0 to {ranks - 1}")
    writer = rank or 0
    if not 0 <= writer < len(checkpoint.manifest.fragments):
        raise Refused(f"{checkpoint.path}: rank {rank}: expected one from 0 to {len(checkpoint.manifest.fragments) - 1}")
    own = checkpoint.per_rank(writer)
    if pointer not in own:
        raise NotACheckpoint(f"{checkpoint.path}: {item!r} has no value of rank {writer}")
    return own[pointer]


class _Arrays:
    """What stands for arrays and for types of torch: torch's, or numpy's and texts."""

    def __init__(self, checkpoint: Checkpoint, kind: ArrayKind) -> None:
        self._checkpoint, self._kind = checkpoint, kind

    def leaf(self, value: Value) -> object:
        if isinstance(value, ArrayReference):
            return self._stored(value)
        if isinstance(value, ArrayValue | DtypeValue | DeviceValue) and self._kind == "torch":
            from elastickpt.training.values import revived_leaf

            return revived_leaf(value)
        if isinstance(value, ArrayValue):
            return _numpy_of(value)
        return value.name if isinstance(value, DtypeValue | DeviceValue) else value

    def _stored(self, reference: ArrayReference) -> object:
        array = ArrayId("extra", reference.item, reference.name, "")
        if array not in self._checkpoint.records:
            raise StateMismatch(
                f"{self._checkpoint.path}: {reference.item}/{reference.name} is no plain array: a tensor that is made of "
                f"several, whose class alone can put it together; ek.load fills one with it"
            )
        if self._kind == "numpy" or reference.origin == "numpy":
            return self._checkpoint.read(array)
        from elastickpt.training.elements import host_elements, host_tensor

        spec = self._checkpoint.records[array].spec
        tensor = host_tensor(spec.dtype, spec.shape)
        self._checkpoint.read_into(array, Box.whole(spec.shape), host_elements(tensor))
        return tensor


def _numpy_of(value: ArrayValue) -> object:
    try:
        dtype = np.dtype(value.dtype)
    except TypeError:
        import ml_dtypes

        dtype = np.dtype(getattr(ml_dtypes, value.dtype))
    array: NDArray[Any] = np.frombuffer(bytearray(value.data), dtype=dtype).reshape(value.shape)
    return array[()] if value.origin == "numpy" else array  # a 0-d array of numpy's was nearly always a scalar


def _built(value: Value, leaf: Callable[[Value], object]) -> object:
    """The same containers with what `leaf` makes of everything else; a named tuple has its fields, and a class of its own."""
    kind = type(value)
    if isinstance(value, NamedTupleValue):
        made = namedtuple(value.type.rpartition(".")[2], value.fields, rename=True)  # type: ignore[misc]
        return made(*(_built(one, leaf) for one in value.values))
    if isinstance(value, dict):
        pairs = [(key, _built(one, leaf)) for key, one in value.items()]
        if isinstance(value, defaultdict):
            return defaultdict(value.default_factory, pairs)
        if isinstance(value, Counter):
            return Counter(dict(pairs))
        return OrderedDict(pairs) if kind is OrderedDict else dict(pairs)
    if isinstance(value, deque):
        return deque((_built(one, leaf) for one in value), value.maxlen)
    if isinstance(value, list | tuple):
        found = [_built(one, leaf) for one in value]
        return found if kind is list else tuple(found)
    return leaf(value)
