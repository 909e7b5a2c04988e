"""One dimension: which of its indices a rank holds, and in which order they lie in the rank's tensor.

A *strand* is a lattice: digits with counts, and for each digit how far one step of it goes in the whole dimension and in the
local one. `heads/tp d` on tp=1 of 2 with 4 heads of 3 is one strand: counts (2, 3), whole offset 6, strides (3, 1) in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from math import prod

from elastickpt.language import tree as t
from elastickpt.language.scope import Scope
from elastickpt.layout.placement import balanced, explicit, torch_chunk

Coordinate = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Digit:
    count: int
    whole: int  # elements of the dimension from one step to the next
    local: int


@dataclass(frozen=True, slots=True)
class Strand:
    """`axes` are those that decide what it is: ranks that differ on others only hold the same."""

    digits: tuple[Digit, ...]
    whole: int
    local: int
    axes: frozenset[str] = frozenset()

    @property
    def count(self) -> int:
        return prod(digit.count for digit in self.digits)


@dataclass(frozen=True, slots=True)
class Extent:
    """One dimension of one rank. `true` is None where nothing is padded. Strands without elements are kept: they have axes."""

    whole: int
    local: int
    true: int | None
    strands: tuple[Strand, ...]


@dataclass(frozen=True, slots=True)
class Lowering:
    """Lowers factors for one rank. `chosen` maps labels to the one local index that is looked at."""

    scope: Scope
    at: Coordinate
    chosen: Mapping[str, int]

    def extent(self, factor: t.Factor) -> Extent:
        match factor:
            case t.Number(value):
                return _atom(value)
            case t.Size(name):
                return _atom(self._size(name, factor.at))
            case t.Pad(size, multiple):
                return self._pad(size, multiple, factor.at)
            case t.Sum(parts):
                return self._sum(parts)
            case t.Cut(inner, axes, mode):
                return self._cut(self.extent(inner), axes, mode, factor.at)
            case t.Deal(inner, axis):
                return self._deal(self.extent(inner), axis, factor.at)
            case t.Cat():
                raise self.scope.fault("cat(...) can stand alone or inside pad only, as it has its own names", factor.at)

    def _size(self, name: str, at: t.TextPlace) -> int:
        found = self.scope.size(name)
        if found is None:
            raise self.scope.fault(f"the size {name!r} cannot be found from the files: give --set {name}=N", at)
        return found

    def _pad(self, size: t.Size | t.Cat | t.Cut, multiple: t.Expr | None, at: t.TextPlace) -> Extent:
        if isinstance(size, t.Cat):
            raise self.scope.fault("cat(...) can stand alone only", at)
        step = 1 if multiple is None else self.scope.value(multiple)
        if step < 1:
            raise self.scope.fault(f"pad to a multiple of {step}: expected at least 1", at)
        if isinstance(size, t.Cut):
            return self._pad_each(size, step)
        true = self._size(size.name, size.at)
        return replace(_atom(-(-true // step) * step), true=true)

    def _pad_each(self, cut: t.Cut, step: int) -> Extent:
        """Each share filled up by itself: in the whole all true indices come first, then the padding, share by share."""
        own = self.extent(cut)
        axes = sorted(axes_of_factor(cut))
        before, padding = own.whole, {}
        for index in product(*(range(self.scope.axis(axis, cut.at)) for axis in axes)):
            place = dict(zip(axes, index, strict=True))
            count = replace(self, at={**self.at, **place}).extent(cut).local
            padding[index] = before
            before += -count % step
        here = tuple(self.at.get(axis, 0) for axis in axes)
        filled = Strand((Digit(-own.local % step, 1, 1),), padding[here], own.local, frozenset(axes))
        return Extent(before, own.local + filled.count, own.whole, (*own.strands, filled))

    def _sum(self, parts: Sequence[t.Product]) -> Extent:
        extents = [self._product(part) for part in parts]
        if len(extents) == 1:
            return extents[0]
        strands, whole, local = [], 0, 0
        for extent in extents:
            strands += [replace(s, whole=s.whole + whole, local=s.local + local) for s in extent.strands]
            whole, local = whole + extent.whole, local + extent.local
        return Extent(whole, local, None, tuple(strands))

    def _product(self, part: t.Product) -> Extent:
        extents = [self.extent(factor) for factor in part.factors]
        found = extents[-1]
        for outer in reversed(extents[:-1]):
            found = _times(outer, found)
        if part.label is not None and part.label in self.chosen:
            index = self.chosen[part.label]
            axes = frozenset(axis for strand in found.strands for axis in strand.axes)
            return Extent(1, found.local, None, (Strand((), 0, index, axes),))
        return found

    def _cut(self, inner: Extent, axes: tuple[str, ...], mode: t.SplitMode, at: t.TextPlace) -> Extent:
        ways, index = self._position(axes, at)
        if mode == "even":
            low, high = self._even(inner.local, ways, f"along {' '.join(axes)}", at)[index]
        else:
            low, high = self._shares(inner.local, ways, mode, at)[index]
        return Extent(inner.whole, high - low, inner.true, _restricted(inner, low, high, frozenset(axes)))

    def _shares(self, extent: int, ways: int, mode: t.SplitMode, at: t.TextPlace) -> Sequence[tuple[int, int]]:
        if not isinstance(mode, t.Sizes):
            return torch_chunk(extent, ways) if mode == "chunk" else balanced(extent, ways)
        named = mode.values
        sizes = self.scope.listed(named, ways, at) if isinstance(named, str) else [self.scope.value(one) for one in named]
        if sizes is None:
            return self._even(extent, ways, f"here: give --set {named}=N,N,..., a size for each share", at)
        if len(sizes) != ways or sum(sizes) != extent or min(sizes) < 0:
            raise self.scope.fault(
                f"sizes {tuple(sizes)} add up to {sum(sizes)} in {len(sizes)} shares: expected {extent} in {ways}", at
            )
        return explicit(extent, sizes)

    def _even(self, extent: int, ways: int, where: str, at: t.TextPlace) -> Sequence[tuple[int, int]]:
        if extent % ways:
            raise self.scope.fault(f"{extent} cannot be cut evenly {ways} ways {where}", at)
        return balanced(extent, ways)

    def _position(self, axes: tuple[str, ...], at: t.TextPlace) -> tuple[int, int]:
        ways, index = 1, 0
        for axis in axes:
            size = self.scope.axis(axis, at)
            ways, index = ways * size, index * size + self.at.get(axis, 0)
        return ways, index

    def _deal(self, inner: Extent, axis: str, at: t.TextPlace) -> Extent:
        ways, index = self._position((axis,), at)
        if len(inner.strands) != 1 or len(inner.strands[0].digits) > 1:
            raise self.scope.fault("only a plain size can be dealt: write heads%tp head_dim", at)
        (strand,) = inner.strands
        step = strand.digits[0].whole if strand.digits else 1
        count = max(-(-(inner.local - index) // ways), 0)
        dealt = Strand((Digit(count, step * ways, 1),), strand.whole + index * step, 0, strand.axes | {axis})
        return Extent(inner.whole, count, inner.true, (dealt,))


def _atom(count: int) -> Extent:
    return Extent(count, count, None, (Strand((Digit(count, 1, 1),), 0, 0),))


def _times(outer: Extent, inner: Extent) -> Extent:
    strands = []
    for a, b in product(outer.strands, inner.strands):
        digits = tuple(Digit(d.count, d.whole * inner.whole, d.local * inner.local) for d in a.digits)
        whole, local = a.whole * inner.whole + b.whole, a.local * inner.local + b.local
        strands.append(Strand(digits + b.digits, whole, local, a.axes | b.axes))
    true = None if outer.true is None else outer.true * inner.whole
    return Extent(outer.whole * inner.whole, outer.local * inner.local, true, tuple(strands))


def _restricted(extent: Extent, low: int, high: int, axes: frozenset[str]) -> tuple[Strand, ...]:
    """The strands of local indices [low, high), counted anew from 0; one without elements where nothing is left."""
    found = [
        replace(part, local=part.local - low, axes=part.axes | axes)
        for strand in extent.strands
        for part in clipped(strand, low, high)
    ]
    used = frozenset(axis for strand in extent.strands for axis in strand.axes)
    return tuple(found) or (Strand((Digit(0, 1, 1),), 0, 0, used | axes),)


def clipped(strand: Strand, low: int, high: int) -> Iterator[Strand]:
    """The part of a strand whose local indices lie in [low, high), as few strands as that takes; none that is empty."""
    if strand.count == 0 or low >= high:
        return
    last = strand.local + sum((d.count - 1) * d.local for d in strand.digits)
    if low <= strand.local and last < high:
        yield strand
        return
    if last < low or strand.local >= high:
        return
    order = sorted(strand.digits, key=lambda digit: -digit.local)
    outer, inner = order[0], tuple(order[1:])
    span = 1 + sum((d.count - 1) * d.local for d in inner)
    first_whole = max(0, -(-(low - strand.local) // outer.local))
    stop_whole = min(outer.count, (high - span - strand.local) // outer.local + 1) if high - span >= strand.local else 0
    first_touched = max(0, (low - strand.local - span) // outer.local + 1)
    stop_touched = min(outer.count, -(-(high - strand.local) // outer.local))
    if first_whole >= stop_whole:  # no step of the outer digit lies inside whole
        for k in range(first_touched, stop_touched):
            yield from clipped(_step(strand, inner, outer, k), low, high)
        return
    for k in range(first_touched, first_whole):
        yield from clipped(_step(strand, inner, outer, k), low, high)
    middle = _step(strand, inner, outer, first_whole)
    yield replace(middle, digits=(replace(outer, count=stop_whole - first_whole), *inner))
    for k in range(stop_whole, stop_touched):
        yield from clipped(_step(strand, inner, outer, k), low, high)


def _step(strand: Strand, inner: tuple[Digit, ...], outer: Digit, k: int) -> Strand:
    return Strand(inner, strand.whole + k * outer.whole, strand.local + k * outer.local, strand.axes)


def whole_index(extent: Extent, local: int) -> int:
    """The index in the whole of a local index."""
    for strand in extent.strands:
        for one in clipped(strand, local, local + 1):
            return one.whole
    raise IndexError(local)


def axes_of_factor(factor: t.Factor) -> set[str]:
    """All axes that cut a factor."""
    match factor:
        case t.Cut(inner, axes):
            return {*axes, *axes_of_factor(inner)}
        case t.Deal(inner, axis):
            return {axis, *axes_of_factor(inner)}
        case t.Pad(size):
            return axes_of_factor(size)
        case t.Sum(parts):
            return {axis for part in parts for one in part.factors for axis in axes_of_factor(one)}
        case _:
            return set()


# -- sizes that are found ----------------------------------------------------------------------------------------------


def unknown_sizes(factor: t.Factor, scope: Scope) -> tuple[t.Size, ...]:
    """The sizes in it that are neither constants nor found yet."""
    match factor:
        case t.Size(name):
            return () if scope.size(name) is not None else (factor,)
        case t.Pad(size):
            return unknown_sizes(size, scope)
        case t.Sum(parts):
            return tuple(size for part in parts for one in part.factors for size in unknown_sizes(one, scope))
        case t.Cut(inner) | t.Deal(inner):
            return unknown_sizes(inner, scope)
        case _:
            return ()


def solved(factor: t.Factor, scope: Scope, name: str, mean: Fraction) -> int | None:
    """The size `name` with which ranks hold `mean` indices of the dimension on average; None if there is none.

    On average every kind of cut leaves the extent divided by its ways, so that the equation is a line. What is filled up tells
    no true size.
    """
    if _is_filled(factor, name):
        return None
    zero, one = (_mean(factor, scope.with_sizes({name: value})) for value in (0, 1))
    if one == zero:
        return None
    size = (mean - zero) / (one - zero)
    return size.numerator if size.denominator == 1 and size >= 0 else None


def _is_filled(factor: t.Factor, name: str) -> bool:
    """Whether it fills something up to a multiple that it does not know, or each share of something."""
    match factor:
        case t.Pad(size, multiple):
            return multiple is not None and size in (t.Size(name), size if isinstance(size, t.Cut) else None)
        case t.Sum(parts):
            return any(_is_filled(one, name) for part in parts for one in part.factors)
        case t.Cut(inner) | t.Deal(inner):
            return _is_filled(inner, name)
        case _:
            return False


def _mean(factor: t.Factor, scope: Scope) -> Fraction:
    match factor:
        case t.Number(value):
            return Fraction(value)
        case t.Size(name):
            return Fraction(scope.size(name) or 0)
        case t.Sum(parts):
            return sum((prod((_mean(one, scope) for one in part.factors), start=Fraction(1)) for part in parts), Fraction(0))
        case t.Cut(inner, axes):
            return _mean(inner, scope) / prod(scope.axis(axis, factor.at) for axis in axes)
        case t.Deal(inner, axis):
            return _mean(inner, scope) / scope.axis(axis, factor.at)
        case t.Pad(size, multiple):
            true = _mean(size, scope)
            step = 1 if multiple is None else scope.value(multiple)
            return Fraction(-(-true // step) * step)
        case t.Cat():
            return Fraction(0)
