"""Held pieces: how parts of a rank's tensor lie in the whole array, as lattices in both; boxes, proofs, transfers.

A held piece lies in a *view* of its array whose dimensions may be factored: `(heads 2 r) h` against `(heads r 2) h` is one
piece of four digits, not one for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from elastickpt.format.arrays import Box
from elastickpt.language import tree as t
from elastickpt.language.scope import Scope
from elastickpt.language.strands import Coordinate, Digit, Lowering, Strand, clipped
from elastickpt.layout.algebra import CoverageReport, intersect, prove_coverage
from elastickpt.layout.grid import c_strides
from elastickpt.layout.placement import flat_boxes


@dataclass(frozen=True, slots=True)
class Strides:
    """First element and one stride for each digit, in elements of the array's C order."""

    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HeldPiece:
    """Element (k1, k2, ...) of the digits is one element of the whole and of the local tensor.

    `axes`: ranks that differ on no others hold other pieces, ranks that differ on others hold the same.
    """

    extents: tuple[int, ...]
    whole: Strides
    local: Strides
    axes: frozenset[str] = frozenset()

    @property
    def count(self) -> int:
        return prod(self.extents)


@dataclass(frozen=True, slots=True)
class HeldParts:
    """All that one rank's tensor holds of one whole array. `true` is None where nothing is padded."""

    whole: tuple[int, ...]
    local: tuple[int, ...]
    true: tuple[int, ...] | None
    pieces: tuple[HeldPiece, ...]


def lower(dims: Sequence[t.Factor], scope: Scope, at: Coordinate, *, chosen: Mapping[str, int] | None = None) -> HeldParts:
    """What the rank at a coordinate holds of the array with these dimensions. Raises ProgramFault where sizes do not fit.

    `chosen`: of stacked names the one index that is looked at; that dimension has one element then, or is left out where it
    is one by itself.
    """
    lowering = Lowering(scope, at, chosen or {})
    extents = [lowering.extent(factor) for factor in dims]
    local = tuple(extent.local for extent in extents)
    stays = [not _is_chosen(factor, lowering.chosen) for factor in dims]
    whole = tuple(extent.whole for extent, stay in zip(extents, stays, strict=True) if stay)
    whole_steps = _spread(c_strides(whole, 1), stays)
    local_steps = c_strides(local, 1)
    pieces = [_piece(strands, whole_steps, local_steps) for strands in product(*(extent.strands for extent in extents))]
    padded = [extent for extent, stay in zip(extents, stays, strict=True) if stay]
    true = tuple(e.whole if e.true is None else e.true for e in padded) if any(e.true is not None for e in padded) else None
    return HeldParts(whole, local, true, tuple(pieces))


def _is_chosen(factor: t.Factor, chosen: Mapping[str, int]) -> bool:
    return isinstance(factor, t.Sum) and len(factor.parts) == 1 and factor.parts[0].label in chosen


def _spread(steps: Sequence[int], stays: Sequence[bool]) -> tuple[int, ...]:
    left = iter(steps)
    return tuple(next(left) if stay else 0 for stay in stays)


def _piece(strands: Sequence[Strand], whole: Sequence[int], local: Sequence[int]) -> HeldPiece:
    digits: list[Digit] = []
    for strand, w, n in zip(strands, whole, local, strict=True):
        digits += [Digit(d.count, d.whole * w, d.local * n) for d in strand.digits]
    digits = [digit for digit in digits if digit.count != 1]
    return HeldPiece(
        tuple(d.count for d in digits),
        Strides(sum(s.whole * w for s, w in zip(strands, whole, strict=True)), tuple(d.whole for d in digits)),
        Strides(sum(s.local * n for s, n in zip(strands, local, strict=True)), tuple(d.local for d in digits)),
        frozenset(axis for strand in strands for axis in strand.axes),
    )


# -- flat tensors ------------------------------------------------------------------------------------------------------


def flat_part(held: HeldParts, first: int, low: int, high: int) -> HeldParts:
    """What a flat tensor holds that has elements [low, high) of a tensor's own C order at its place `first`."""
    pieces = []
    for piece in held.pieces:
        digits = tuple(map(Digit, piece.extents, piece.whole.strides, piece.local.strides))
        for one in clipped(Strand(digits, piece.whole.offset, piece.local.offset, piece.axes), low, high):
            counts, steps, places = ([getattr(d, n) for d in one.digits] for n in ("count", "whole", "local"))
            whole, local = Strides(one.whole, tuple(steps)), Strides(one.local - low + first, tuple(places))
            pieces.append(HeldPiece(tuple(counts), whole, local, piece.axes))
    return HeldParts(held.whole, (first + high - low,), held.true, tuple(pieces))


# -- views, proofs -----------------------------------------------------------------------------------------------------


def common_view(count: int, pieces: Iterable[HeldPiece]) -> tuple[int, ...]:
    """Extents of the view in which these pieces are boxes, as far as their strides divide each other: the finest one."""
    strides = sorted({s for p in pieces for s, n in zip(p.whole.strides, p.extents, strict=True) if n > 1 and s}, reverse=True)
    chain: list[int] = []
    for stride in (*strides, 1):
        if count % stride == 0 and (not chain or (chain[-1] % stride == 0 and chain[-1] != stride)):
            chain.append(stride)
    return tuple(a // b for a, b in zip((count, *chain), chain, strict=False))


@dataclass(frozen=True, slots=True)
class ViewBox:
    """A box in a view, all of which one piece holds: element [0, ...] lies at `local`, with one stride a dimension."""

    box: Box
    local: int
    strides: tuple[int, ...]


def view_boxes(piece: HeldPiece, view: Sequence[int]) -> Iterator[ViewBox]:
    """The piece as boxes of the view: one, unless a digit does not follow the view's dimensions."""
    if piece.count == 0:
        return
    steps = c_strides(tuple(view), 1)
    for k, (n, stride) in enumerate(zip(piece.extents, piece.whole.strides, strict=True)):
        if stride not in steps:  # it follows no dimension: each of its steps by itself
            for index in range(n):
                yield from view_boxes(_at_step(piece, k, index), view)
            return
    order = sorted(range(len(piece.extents)), key=lambda k: -piece.whole.strides[k])
    coordinates = [piece.whole.offset // step % extent for step, extent in zip(steps, view, strict=True)]
    ranges = [[(low, low + 1)] for low in coordinates]
    local_strides = [0] * len(view)
    upper = 0
    for k in order:
        n, dim = piece.extents[k], steps.index(piece.whole.strides[k])
        low = 0
        for axis in range(upper, dim + 1):
            low = low * view[axis] + coordinates[axis]
        room = prod(view[upper : dim + 1])
        if low + n > room:  # it runs over into a slower dimension: what fits, and the rest
            yield from view_boxes(_cut(piece, k, 0, room - low), view)
            yield from view_boxes(_cut(piece, k, room - low, n), view)
            return
        boxes = flat_boxes(Box.whole(view[upper : dim + 1]), low, low + n)
        if len(boxes) > 1:
            done = 0
            for box in boxes:
                yield from view_boxes(_cut(piece, k, done, done + box.count), view)
                done += box.count
            return
        step = piece.local.strides[k]
        for axis in range(dim, upper - 1, -1):
            ranges[axis] = [(boxes[0].start[axis - upper], boxes[0].stop[axis - upper])]
            local_strides[axis] = step
            step *= view[axis]
        upper = dim + 1
    start, stop = zip(*(one[0] for one in ranges), strict=True) if ranges else ((), ())
    yield ViewBox(Box(tuple(start), tuple(stop)), piece.local.offset, tuple(local_strides))


def _at_step(piece: HeldPiece, k: int, index: int) -> HeldPiece:
    one = _cut(piece, k, index, index + 1)
    whole, local = (replace(side, strides=_without(side.strides, k)) for side in (one.whole, one.local))
    return replace(one, extents=_without(one.extents, k), whole=whole, local=local)


def _without(values: tuple[int, ...], k: int) -> tuple[int, ...]:
    return (*values[:k], *values[k + 1 :])


def _cut(piece: HeldPiece, k: int, low: int, high: int) -> HeldPiece:
    sides = (replace(s, offset=s.offset + low * s.strides[k]) for s in (piece.whole, piece.local))
    whole, local = sides
    return HeldPiece((*piece.extents[:k], high - low, *piece.extents[k + 1 :]), whole, local, piece.axes)


def prove_pieces(shape: Sequence[int], pieces: Sequence[HeldPiece]) -> CoverageReport:
    """How pieces cover an array of this shape; gaps and overlaps are boxes of their common view."""
    view = common_view(prod(shape), pieces)
    return prove_coverage(view, [one.box for piece in pieces for one in view_boxes(piece, view)])


# -- from one layout to another ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transfer:
    """Elements that go from one rank's tensor to another's, as lattices in both; strides of one digit each."""

    extents: tuple[int, ...]
    source: Strides
    target: Strides

    @property
    def count(self) -> int:
        return prod(self.extents)


def transfers(count: int, sources: Sequence[HeldPiece], targets: Sequence[HeldPiece]) -> Iterator[tuple[int, int, Transfer]]:
    """(source piece, target piece, what goes between them) of an array of `count` elements, never made whole."""
    view = common_view(count, [*sources, *targets])
    given = [(number, one) for number, piece in enumerate(sources) for one in view_boxes(piece, view)]
    for number, piece in enumerate(targets):
        for wanted in view_boxes(piece, view):
            for origin, have in given:
                common = intersect(have.box, wanted.box)
                if common is not None:
                    yield origin, number, _transfer(common, have, wanted)


def _transfer(common: Box, have: ViewBox, wanted: ViewBox) -> Transfer:
    sides = []
    for one in (have, wanted):
        at = sum((low - zero) * s for low, zero, s in zip(common.start, one.box.start, one.strides, strict=True))
        sides.append(Strides(one.local + at, one.strides))
    return _folded(common.shape, *sides)


def _folded(extents: Sequence[int], source: Strides, target: Strides) -> Transfer:
    """With neighbouring digits that continue each other on both sides as one."""
    digits: list[tuple[int, int, int]] = []
    for n, s, d in zip(extents, source.strides, target.strides, strict=True):
        if n == 1:
            continue
        if digits and digits[-1][1] == n * s and digits[-1][2] == n * d:
            digits[-1] = (digits[-1][0] * n, s, d)
        else:
            digits.append((n, s, d))
    counts, first, second = ([one[k] for one in digits] for k in range(3))
    return Transfer(tuple(counts), Strides(source.offset, tuple(first)), Strides(target.offset, tuple(second)))
