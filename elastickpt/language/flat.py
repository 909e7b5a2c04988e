"""Flat tensors: the tensors of an order laid one after the other, as ZeRO and FSDP hold them. Plan level: shapes, no files.

    pad(cat(o), m)/dp       laid, filled up to a multiple of m, cut       (ZeRO-1 and 2, FSDP1)
    cat(o, pad |dp|)/dp     each filled up to a multiple, cut, then laid  (ZeRO-3)

Padding is on no rank: whatever stands there is nobody's element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from elastickpt.errors import ProgramFault
from elastickpt.language import tree as t
from elastickpt.language.held import Held, flat_part
from elastickpt.language.scope import Scope
from elastickpt.language.strands import Coordinate
from elastickpt.layout.partition import balanced, torch_chunk


@dataclass(frozen=True, slots=True)
class Listed:
    """A tensor of an order: the whole array's name, and what the rank holds of it before anything is laid flat."""

    name: str
    held: Held


@dataclass(frozen=True, slots=True)
class Flat:
    """What a rank's flat tensor of `count` elements, padding among them, holds of each array."""

    count: int
    parts: tuple[Listed, ...]


def lay_flat(factor: t.Factor, order: Sequence[Listed], scope: Scope, at: Coordinate) -> Flat:
    """What the rank at a coordinate has in a flat tensor of these dimensions.

    Raises ProgramFault for a factor that is no flat one, and for padding that does not divide.
    """
    cuts: list[t.Cut] = []
    inner = factor
    while isinstance(inner, t.Cut):
        cuts.insert(0, inner)
        inner = inner.inner
    if isinstance(inner, t.Cat) and inner.each is not None:
        return _each(order, scope.value(inner.each), cuts, scope, at)
    if isinstance(inner, t.Pad) and isinstance(inner.size, t.Cat):
        step = 1 if inner.multiple is None else scope.value(inner.multiple)
        return _whole(order, step, cuts, scope, at)
    if isinstance(inner, t.Cat):
        return _whole(order, 1, cuts, scope, at)
    raise scope.fault("expected cat(order) or pad(cat(order), n), cut along axes or not", getattr(factor, "at", t.NOWHERE))


def _whole(order: Sequence[Listed], step: int, cuts: Sequence[t.Cut], scope: Scope, at: Coordinate) -> Flat:
    total = sum(prod(one.held.local) for one in order)
    low, high = _share(-(-total // step) * step, cuts, scope, at)
    parts, first = [], 0
    for one in order:
        count = prod(one.held.local)
        start, stop = max(low, first), min(high, first + count)
        if start < stop:
            parts.append(Listed(one.name, flat_part(one.held, start - low, start - first, stop - first)))
        first += count
    return Flat(high - low, tuple(parts))


def _each(order: Sequence[Listed], step: int, cuts: Sequence[t.Cut], scope: Scope, at: Coordinate) -> Flat:
    parts, place = [], 0
    for one in order:
        count = prod(one.held.local)
        low, high = _share(-(-count // step) * step, cuts, scope, at)
        if low < min(high, count):
            parts.append(Listed(one.name, flat_part(one.held, place, low, min(high, count))))
        place += high - low
    return Flat(place, tuple(parts))


def _share(extent: int, cuts: Sequence[t.Cut], scope: Scope, at: Coordinate) -> tuple[int, int]:
    """The part of [0, extent) that is left after all cuts."""
    low, high = 0, extent
    for cut in cuts:
        ways, index = 1, 0
        for axis in cut.axes:
            size = scope.axis(axis, cut.at)
            ways, index = ways * size, index * size + at.get(axis, 0)
        shares = _shares(high - low, ways, cut, scope)
        low, high = low + shares[index][0], low + shares[index][1]
    return low, high


def _shares(extent: int, ways: int, cut: t.Cut, scope: Scope) -> Sequence[tuple[int, int]]:
    if isinstance(cut.mode, t.Sizes):
        raise _unlike(cut, scope)
    if cut.mode == "chunk":
        return torch_chunk(extent, ways)
    if cut.mode == "even" and extent % ways:
        raise scope.fault(f"{extent} elements cannot be cut evenly {ways} ways: pad them to a multiple", cut.at)
    return balanced(extent, ways)


def _unlike(cut: t.Cut, scope: Scope) -> ProgramFault:
    return scope.fault("a flat tensor is cut evenly, by chunk or balanced", cut.at)
