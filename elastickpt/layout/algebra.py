"""Set algebra of boxes, and the proof that boxes cover a region exactly once, or where they do not.

All boxes are in one coordinate frame, global unless a name says otherwise. For the proof the region is cut, again and again,
along planes that no box crosses, until a part holds one box or none; rows, columns, grids and flat ranges of ranks fall apart
that way in O(n log n). Where every plane crosses a box (a pinwheel of boxes, or boxes that overlap), it is cut at a boundary in
the middle and the crossing boxes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

from elastickpt.errors import CoverageGap, CoverageOverlap, Malformed
from elastickpt.format.arrays import ArraySpec, Box


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


LISTED = 8  # entries of a report: enough to see the pattern

Point = tuple[int, ...]
SplitItem = tuple[Point, Point, int]  # a box clipped to the part it stands in: start, stop, its number in the input
SplitPart = tuple[Point, Point, list[SplitItem]]  # start and stop of a part of the region, and what stands in it


@dataclass(frozen=True, slots=True)
class CoverageReport:
    """What is wrong with a cover; both are empty exactly when every element is covered once.

    `gaps` are disjoint boxes that nothing covers. `overlaps` are (i, j, common box) with i < j, numbers in the input.
    The proof stops when either has 8 entries; a report with fewer of both is complete.
    """

    gaps: tuple[Box, ...] = ()
    overlaps: tuple[tuple[int, int, Box], ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every element is covered exactly once."""
        return not self.gaps and not self.overlaps


def prove_coverage(shape: Sequence[int], boxes: Sequence[Box]) -> CoverageReport:
    """How `boxes` cover an array of this shape. Empty boxes are ignored; an array without elements needs none.

    Raises Malformed for a box that reaches beyond the array.
    """
    return prove_box_coverage(Box.whole(shape), boxes)


def prove_box_coverage(region: Box, boxes: Sequence[Box]) -> CoverageReport:
    """How `boxes` cover `region`, in one coordinate frame. Raises Malformed for a box that reaches beyond it."""
    return _prove(region, boxes, "box {}".format)


def require_coverage(spec: ArraySpec, boxes: Sequence[Box], names: Sequence[str]) -> None:
    """Returns only if `boxes` cover the array exactly once; `names[i]` says who wrote `boxes[i]`.

    Raises Malformed (a box beyond the array), CoverageOverlap or CoverageGap, naming array, box and who.
    """
    report = _prove(Box.whole(spec.shape), boxes, lambda number: f"array {spec.id}: {names[number]}:")
    if report.overlaps:
        first, second, box = report.overlaps[0]
        more = f", and {len(report.overlaps) - 1} more overlaps" if len(report.overlaps) > 1 else ""
        raise CoverageOverlap(
            f"array {spec.id} of shape {spec.shape}: {box} was written twice, by {names[first]} (box {boxes[first]}) "
            f"and by {names[second]} (box {boxes[second]}){more}"
        )
    if report.gaps:
        who = ", ".join(sorted(set(names))[:LISTED]) or "nobody"
        gaps = ", ".join(map(str, report.gaps))
        raise CoverageGap(f"array {spec.id} of shape {spec.shape}: nobody wrote {gaps}; it was written by {who}")


def _prove(region: Box, boxes: Sequence[Box], label: Callable[[int], str]) -> CoverageReport:
    if _stacked(region, boxes):
        return CoverageReport()
    work: list[SplitPart] = [(region.start, region.stop, _items(region, boxes, label))] if region.count else []
    gaps: list[Box] = []
    overlaps: dict[tuple[int, int], Box] = {}
    while work and len(gaps) < LISTED and len(overlaps) < LISTED:
        start, stop, items = part = work.pop()
        if not items:
            gaps.append(Box(start, stop))
        elif len(items) == 1:
            gaps.extend(subtract(Box(start, stop), Box(*items[0][:2])))
        elif (parts := _cut_between(part)) is not None or (parts := _cut_through(part)) is not None:
            work.extend(reversed(parts))
        else:  # every box fills the part
            numbers = sorted(number for _, _, number in items)
            for i, j in islice(combinations(numbers, 2), LISTED):
                overlaps[i, j] = _common(boxes[i], boxes[j])
    listed = sorted(overlaps.items())[:LISTED]
    return CoverageReport(tuple(gaps[:LISTED]), tuple((i, j, box) for (i, j), box in listed))


def _stacked(region: Box, boxes: Sequence[Box]) -> bool:
    """Whether the boxes are slabs of the region that follow each other along the first axis, as most layouts have them: 2 µs
    for four of them, where the proof takes 13. False says nothing."""
    if not region.start:
        return len(boxes) == 1 and boxes[0] == region
    across = region.start[1:], region.stop[1:]
    edge = region.start[0]
    for box in sorted(boxes):
        if not box.start or box.start[0] != edge or (box.start[1:], box.stop[1:]) != across or box.stop[0] == edge:
            return False
        edge = box.stop[0]
    return edge == region.stop[0]


def _items(region: Box, boxes: Sequence[Box], label: Callable[[int], str]) -> list[SplitItem]:
    items = []
    for number, box in enumerate(boxes):
        if box.ndim != region.ndim or not contains(region, box):
            raise Malformed(f"{label(number)} {box} reaches beyond {region}")
        if box.count:
            items.append((box.start, box.stop, number))
    return items


def _common(a: Box, b: Box) -> Box:
    return Box(tuple(map(max, a.start, b.start)), tuple(map(min, a.stop, b.stop)))


def _cut_between(part: SplitPart) -> list[SplitPart] | None:
    """The part, cut along an axis where no box crosses, less the slabs that one box fills; None without a cut."""
    start, stop, items = part
    for axis in range(len(start)):
        slabs = _slabs(items, axis, start[axis], stop[axis])
        if len(slabs) == 1:
            continue
        parts = []
        for low, high, inside in slabs:
            first, last = _with(start, axis, low), _with(stop, axis, high)
            if len(inside) != 1 or inside[0][0] != first or inside[0][1] != last:
                parts.append((first, last, inside))
        return parts
    return None


def _slabs(items: list[SplitItem], axis: int, start: int, stop: int) -> list[tuple[int, int, list[SplitItem]]]:
    """`[start, stop)` of an axis as (from, to, boxes), cut at every place that no box crosses; gaps have no boxes."""
    slabs: list[tuple[int, int, list[SplitItem]]] = []
    group: list[SplitItem] = []
    low = edge = start
    for item in sorted(items, key=lambda item: item[0][axis]):
        at = item[0][axis]
        if at >= edge:
            if group:
                slabs.append((low, edge, group))
            if at > edge:
                slabs.append((edge, at, []))
            group, low = [], at
        group.append(item)
        edge = max(edge, item[1][axis])
    slabs.append((low, edge, group))
    if edge < stop:
        slabs.append((edge, stop, []))
    return slabs


def _cut_through(part: SplitPart) -> list[SplitPart] | None:
    """The part in two, at the middle one of the boundaries inside it, on the axis with most; None without any."""
    start, stop, items = part
    inner = [
        sorted({at for item in items for at in (item[0][axis], item[1][axis]) if start[axis] < at < stop[axis]})
        for axis in range(len(start))
    ]
    axis = max(range(len(inner)), key=lambda axis: len(inner[axis]), default=0)
    if not inner or not inner[axis]:
        return None
    plane = inner[axis][len(inner[axis]) // 2]
    below = [(low, _with(high, axis, min(high[axis], plane)), n) for low, high, n in items if low[axis] < plane]
    above = [(_with(low, axis, max(low[axis], plane)), high, n) for low, high, n in items if high[axis] > plane]
    return [(start, _with(stop, axis, plane), below), (_with(start, axis, plane), stop, above)]


def _with(point: Point, axis: int, value: int) -> Point:
    return (*point[:axis], value, *point[axis + 1 :])
