"""Which memory is known: whether a tensor of a state dict shows elements of tensors that are saved anyway.

A name says little, as wrappers and hooks rename: an entry that shares memory with a parameter is that parameter.

    weight          bytes [1000, 1400) on cpu
    weight[:10]     bytes [1000, 1040)          covered: nothing new
    weight.clone()  bytes [9000, 9400)          not covered: beyond
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch

from elastickpt.training.composites import leaves_of
from elastickpt.training.dtensors import placed
from elastickpt.training.elements import settled

Span = tuple[str, int, int]  # device, first byte, byte behind the last one


def spans_of(tensor: torch.Tensor) -> tuple[Span, ...] | None:
    """The memory that this rank's part of a tensor spans, one span for each plain tensor inside it; none for what is empty.

    None where there is no telling: sparse tensors, and others without strides.
    """
    found: list[Span] = []
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
