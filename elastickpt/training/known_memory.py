"""Which memory is known: whether a tensor of a state dict shows elements of tensors that are saved anyway; of an optimizer's
state dict also whether an entry follows from states.

A name says little, as wrappers and hooks rename: an entry that shares memory with a parameter is that parameter.

    weight          bytes [1000, 1400) on cpu
    weight[:10]     bytes [1000, 1040)          covered: nothing new
    weight.clone()  bytes [9000, 9400)          not covered: beyond
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch

from elastickpt.training.composites import leaves_of
from elastickpt.training.dtensors import placed
from elastickpt.training.elements import settled
from elastickpt.training.optimizer_parts import OptimizerPart
from elastickpt.training.parameters import OwnedParameter, states_of

MemorySpan = tuple[str, int, int]  # device, first byte, byte behind the last one


def spans_of(tensor: torch.Tensor) -> tuple[MemorySpan, ...] | None:
    """The memory that this rank's part of a tensor spans, one span for each plain tensor inside it; none for what is empty.

    None where there is no telling: sparse tensors, and others without strides.
    """
    found: list[MemorySpan] = []
    for plain in _plain(tensor):
        if plain.layout is not torch.strided or plain.is_nested:
            return None
        if plain.numel():
            reach = 1 + sum((size - 1) * stride for size, stride in zip(plain.shape, plain.stride(), strict=True))
            start = plain.data_ptr()
            found.append((str(plain.device), start, start + reach * plain.element_size()))
    return tuple(found)


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    tensor = settled(tensor)
    parts = placed(tensor)
    for _, inner in leaves_of(tensor if parts is None else parts.local):
        if placed(inner) is not None:
            yield from _plain(inner)
        else:
            yield inner


class KnownMemory:
    """The memory of some tensors."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        spans: dict[str, list[tuple[int, int]]] = {}
        for tensor in tensors:
            for device, start, stop in spans_of(tensor) or ():
                spans.setdefault(device, []).append((start, stop))
        self._starts: dict[str, list[int]] = {}
        self._reach: dict[str, list[int]] = {}  # the farthest byte of any span that starts there or before
        for device, found in spans.items():
            found.sort()
            self._starts[device] = [start for start, _ in found]
            self._reach[device] = list(accumulate((stop for _, stop in found), max))

    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether all memory of the tensor is known; false for an empty one, of which memory says nothing."""
        spans = spans_of(tensor)
        return bool(spans) and all(self._reach_of(device, start + 1) >= stop for device, start, stop in spans or ())

    def touches(self, tensor: torch.Tensor) -> bool:
        """Whether any of the tensor's memory is known."""
        return any(self._reach_of(device, stop) > start for device, start, stop in spans_of(tensor) or ())

    def _reach_of(self, device: str, before: int) -> int:
        """How far known memory reaches that starts before this byte; -1 without any."""
        count = bisect_left(self._starts.get(device, ()), before)
        return self._reach[device][count - 1] if count else -1


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)


Path = tuple[Any, ...]
_NOTHING = object()


class CarriedTensors:
    """Tensors that are carried already."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._kept = tuple(tensors)  # alive, so that no id is used again
        self._ids = {id(tensor) for tensor in self._kept}
        self._memory = KnownMemory(self._kept)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether it is one of them, or shows their elements only."""
        return id(tensor) in self._ids or self._memory.covers(tensor)


class DerivedEntries:
    """Asks an optimizer whether an entry follows from the states of a parameter: it changes when they do.

    For what shares no memory with them. What the object keeps elsewhere has one memory in two state dicts.
    """

    def __init__(self, state_dict: Callable[[], object]) -> None:
        self._state_dict = state_dict
        self._again: object = _NOTHING
        self._found: dict[tuple[Path, object], bool] = {}

    def __call__(
        self, path: Path, key: object, state: object, entry: object, part: OptimizerPart, param: OwnedParameter
    ) -> bool:
        """`path`, `key` and `state` are where the entry stands; one answer counts for all parameters."""
        if (path, state) not in self._found:
            self._found[path, state] = self._asked((*path, key, state), entry, part, param)
        return self._found[path, state]

    def _asked(self, where: Path, entry: object, part: OptimizerPart, param: OwnedParameter) -> bool:
        if self._again is _NOTHING:
            self._again = self._state_dict()
        before = _at(self._again, where)
        memories = [spans_of(one) for one in tensors_in(entry)]
        if memories and memories == [spans_of(one) for one in tensors_in(before)]:
            return False
        states, kept = states_of(part.optimizer), states_of(part.optimizer)[param.parameter]
        states[param.parameter] = {key: _other(value) for key, value in kept.items()}
        try:
            after = _at(self._state_dict(), where)
        except Exception:  # its own code, on states that make no sense: then nothing is known, and the entry is carried
            return False
        finally:
            states[param.parameter] = kept
        return not _alike(before, after)


def _at(tree: object, path: Path) -> object:
    for key in path:
        try:
            tree = tree[key]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return _NOTHING
    return tree


def _other(value: object) -> object:
    """Something of the same form with other contents."""
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            if value.dtype is torch.bool:
                return value.logical_not()
            return value + 1 if value.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16) else value ^ 0x55
    return value + 1 if type(value) in (int, float) else value  # type: ignore[operator]


def _alike(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.eq(one, other).all())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return type(one) is type(other) and (one is other or one == other)
