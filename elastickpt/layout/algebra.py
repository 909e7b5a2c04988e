"""Set algebra of boxes. All boxes are in one coordinate frame, global unless a name says otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from elastickpt.errors import Malformed
from elastickpt.format.box import Box


def intersect(a: Box, b: Box) -> Box | None:
    """The elements in both, None when there are none. Two 0-d boxes intersect in the 0-d box.

    Raises Malformed when the boxes have different numbers of axes, as all functions here do.
    """
    if len(a.start) != len(b.start):
        raise _different(a, b)
    start = tuple(map(max, a.start, b.start))
    stop = tuple(map(min, a.stop, b.stop))
    for low, high in zip(start, stop, strict=True):
        if low >= high:
            return None
    return Box(start, stop)


def subtract(a: Box, b: Box) -> tuple[Box, ...]:
    """The elements of `a` that are not in `b`, as at most 2 * ndim disjoint boxes, none of them empty."""
    common = intersect(a, b)
    if common is None:
        return (a,) if a.count else ()
    rest = []
    start, stop = list(a.start), list(a.stop)
    for axis, (low, high) in enumerate(zip(common.start, common.stop, strict=True)):
        if start[axis] < low:
            rest.append(Box(tuple(start), (*stop[:axis], low, *stop[axis + 1 :])))
        if high < stop[axis]:
            rest.append(Box((*start[:axis], high, *start[axis + 1 :]), tuple(stop)))
        start[axis], stop[axis] = low, high
    return tuple(rest)


def contains(outer: Box, inner: Box) -> bool:
    """Whether every element of `inner` is in `outer`; a box without elements is in every box."""
    if len(outer.start) != len(inner.start):
        raise _different(outer, inner)
    if all(low <= at for low, at in zip(outer.start, inner.start, strict=True)) and all(
        at <= high for high, at in zip(outer.stop, inner.stop, strict=True)
    ):
        return True
    return inner.count == 0


def shift(box: Box, offset: Sequence[int]) -> Box:
    """The box moved by `offset[k]` elements along each axis k. Raises Malformed when it would start below zero."""
    if len(offset) != len(box.start):
        raise Malformed(f"box {box} has {box.ndim} axes, the offset {tuple(offset)} to move it by has {len(offset)}")
    return Box(
        tuple(low + by for low, by in zip(box.start, offset, strict=True)),
        tuple(high + by for high, by in zip(box.stop, offset, strict=True)),
    )


def relative(inner: Box, outer: Box) -> Box:
    """`inner` in the frame whose origin is `outer.start`. Raises Malformed when `inner` is not in `outer`."""
    if not contains(outer, inner):
        raise Malformed(f"box {inner} is not inside box {outer}")
    return shift(inner, tuple(-low for low in outer.start))


def _different(a: Box, b: Box) -> Malformed:
    return Malformed(f"boxes {a} and {b} have different numbers of axes: {a.ndim} and {b.ndim}")
