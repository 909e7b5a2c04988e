"""From mesh and placements to boxes, as torch physically shards; splits of one extent; which part of a box a replica writes.

A placement is `R`, `S(d)` or `_S(d)`, one for each mesh axis. `S(d)` splits dimension d as `torch.chunk` does.
`_S(d)` (strided) is what FSDP2 makes of a parameter that tensor parallelism has split on the same dimension: it is
applied after every plain `S(d)`, whatever the order of the mesh axes, to what those have left. Several placements of
one kind on one dimension apply from the first mesh axis to the last. 50,257 rows under `_S(0)`, `S(0)` on (fsdp=4,
tp=2): tp=0 has 25,129 of them, in chunks of 6,283, so that 6,280 are left for fsdp=3.

A split is exactly `ways` half-open intervals `(start, stop)` in order, adjacent, covering `[0, extent)`; what is
empty at the end is `(extent, extent)`. All counts are in elements. What a replica writes is a function of box and replica
number, so that nobody has to ask.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise, product

from elastickpt.errors import LayoutUnsupported, Malformed
from elastickpt.format.arrays import Box, Mesh
from elastickpt.format.version import MIB

AxisSplit = tuple[tuple[int, int], ...]


def even(extent: int, ways: int) -> AxisSplit:
    """Equal intervals. Raises LayoutUnsupported when the extent leaves a remainder."""
    _check(extent, ways)
    size, remainder = divmod(extent, ways)
    if remainder:
        raise LayoutUnsupported(f"an extent of {extent} cannot be split evenly {ways} ways: {remainder} left over")
    return tuple((k * size, (k + 1) * size) for k in range(ways))


def torch_chunk(extent: int, ways: int) -> AxisSplit:
    """The intervals of `torch.chunk`, padded to `ways`: ceil(extent / ways) each, trailing ones shorter or empty."""
    _check(extent, ways)
    size = -(-extent // ways)
    return tuple((min(k * size, extent), min((k + 1) * size, extent)) for k in range(ways))


def explicit(extent: int, sizes: Sequence[int]) -> AxisSplit:
    """Intervals of these sizes. Raises LayoutUnsupported when one is negative or their sum is not the extent."""
    if any(size < 0 for size in sizes) or sum(sizes) != extent:
        raise LayoutUnsupported(f"sizes {tuple(sizes)} add up to {sum(sizes)}, the extent to split is {extent}")
    return tuple(pairwise(accumulate(sizes, initial=0)))


def balanced(extent: int, ways: int) -> AxisSplit:
    """Intervals that differ by at most one element, the longer ones first."""
    _check(extent, ways)
    size, remainder = divmod(extent, ways)
    return tuple((k * size + min(k, remainder), (k + 1) * size + min(k + 1, remainder)) for k in range(ways))


def flat_boxes(box: Box, start: int, stop: int) -> tuple[Box, ...]:
    """Elements `[start, stop)` of `box`, counted in its C order, as at most 2 * ndim - 1 disjoint boxes in that order.

    What flat sharding (ZeRO, FSDP1) makes of an array: of a [4, 6] box, elements [3, 20) are [0, 3:6], [1:3, :], [3,
    0:2]. Raises Malformed unless `0 <= start <= stop <= box.count`.
    """
    if not 0 <= start <= stop <= box.count:
        raise Malformed(f"elements [{start}, {stop}) of box {box}: it has {box.count}")
    return tuple(_flat(box, start, stop)) if start < stop else ()


def _flat(box: Box, start: int, stop: int) -> Iterator[Box]:
    """At least one element: a partial first row, whole rows, a partial last row, each row in turn by its own axes."""
    whole, shape = box.count, box.shape
    axis = 0
    while stop - start < whole:
        step = whole // shape[axis]
        row, last = start // step, (stop - 1) // step
        if row < last:
            break
        box = _rows(box, axis, (row, row + 1))
        start, stop, whole, axis = start - row * step, stop - row * step, step, axis + 1
    else:
        yield box
        return
    if start > row * step:
        yield from _flat(_rows(box, axis, (row, row + 1)), start - row * step, step)
        row += 1
    full = stop // step
    if row < full:
        yield _rows(box, axis, (row, full))
    if full * step < stop:
        yield from _flat(_rows(box, axis, (full, full + 1)), 0, stop - full * step)


def _rows(box: Box, axis: int, rows: tuple[int, int]) -> Box:
    low = box.start[axis]
    return Box(
        (*box.start[:axis], low + rows[0], *box.start[axis + 1 :]),
        (*box.stop[:axis], low + rows[1], *box.stop[axis + 1 :]),
    )


def _check(extent: int, ways: int) -> None:
    if extent < 0 or ways < 1:
        raise LayoutUnsupported(f"an extent of {extent} cannot be split {ways} ways")


MIN_SPLIT_NBYTES = MIB  # below this, one more file to open and sync costs more than the bytes that another rank saves


def share_of(box: Box, *, itemsize: int, index: int, count: int, salt: int) -> tuple[Box, ...]:
    """What replica `index` of `count` writes of `box`; over all indices the shares cover it exactly once.

    A box under 1 MiB goes whole to replica `salt % count`. A larger one is split by rows of the first axis with at
    least `count` of them, or by flat ranges where there is none, as evenly as whole rows or elements allow; the
    remainder goes to the replicas from `salt % count` on. `salt` is any number that all replicas know, one an array,
    so that the small arrays and the remainders spread over the replicas. Raises LayoutUnsupported unless `0 <= index
    < count`.
    """
    if not 0 <= index < count:
        raise LayoutUnsupported(f"replica {index} of {count} of box {box}")
    turn = (index - salt) % count
    if count == 1 or box.count * itemsize < MIN_SPLIT_NBYTES:
        return (box,) if turn == 0 and box.count else ()
    for axis, extent in enumerate(box.shape):
        if extent >= count:
            low = box.start[axis]
            first, last = balanced(extent, count)[turn]
            start = (*box.start[:axis], low + first, *box.start[axis + 1 :])
            return (Box(start, (*box.stop[:axis], low + last, *box.stop[axis + 1 :])),)
    return flat_boxes(box, *balanced(box.count, count)[turn])


_PLACEMENT = re.compile(r"R|(_?)S\((0|[1-9][0-9]*)\)", re.ASCII)


def physical_box(shape: Sequence[int], *, sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[str]) -> Box:
    """The box of an array of this shape that the rank at this coordinate of a mesh of these sizes holds.

    Where nothing is left for a rank, its box is empty and stands at the end of what was split. Raises
    LayoutUnsupported for a placement that is none of the three, a dimension that the array lacks, or a coordinate
    outside the mesh.
    """
    return _physical_box(tuple(shape), tuple(sizes), tuple(coordinate), tuple(placements))


@lru_cache(maxsize=4096)  # a model has many arrays of one shape, and an optimizer's states have it again
def _physical_box(
    shape: tuple[int, ...], sizes: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[str, ...]
) -> Box:
    if not len(sizes) == len(coordinate) == len(placements) or any(
        not 0 <= index < size for index, size in zip(coordinate, sizes, strict=True)
    ):
        raise LayoutUnsupported(
            f"coordinate {tuple(coordinate)} with placements {tuple(placements)} on a mesh of sizes {tuple(sizes)}"
        )
    start, stop = [0] * len(shape), list(map(int, shape))
    for axis, dim in _splits(placements, len(shape)):
        low, high = start[dim], stop[dim]
        size = -(-(high - low) // sizes[axis])
        start[dim] = min(low + coordinate[axis] * size, high)
        stop[dim] = min(start[dim] + size, high)
    return Box(tuple(start), tuple(stop))


@lru_cache(maxsize=4096)
def places_that_hold(
    within: Box, *, shape: tuple[int, ...], sizes: tuple[int, ...], placements: tuple[str, ...]
) -> tuple[int, ...]:
    """The places in a mesh, rising, in the order of its ranks, whose `physical_box` has an element in common with `within`.

    Looks at those alone, however large the mesh is. Raises LayoutUnsupported as `physical_box`.
    """
    if len(sizes) != len(placements) or within.ndim != len(shape):
        raise LayoutUnsupported(f"{within} of an array of shape {shape} under {placements} on a mesh of sizes {sizes}")
    parts: list[tuple[Box, dict[int, int]]] = [(Box.whole(shape), {})] if within.count else []
    for axis, dim in _splits(placements, len(shape)):
        parts = [(cut, {**at, axis: index}) for box, at in parts for index, cut in _cuts(box, within, dim, sizes[axis])]
    places = (product(*([at[a]] if a in at else range(size) for a, size in enumerate(sizes))) for _, at in parts)
    return tuple(sorted(_number_of(coordinate, sizes) for some in places for coordinate in some))


def _cuts(box: Box, within: Box, dim: int, count: int) -> Iterator[tuple[int, Box]]:
    """Of `count` chunks of the box along a dimension those that reach into `within`, with their numbers."""
    low, high = box.start[dim], box.stop[dim]
    first, stop = max(low, within.start[dim]), min(high, within.stop[dim])
    if first < stop:
        size = -(-(high - low) // count)
        for index in range((first - low) // size, (stop - 1 - low) // size + 1):
            start = low + index * size
            stops = (*box.stop[:dim], min(start + size, high), *box.stop[dim + 1 :])
            yield index, Box((*box.start[:dim], start, *box.start[dim + 1 :]), stops)


def cuts_of(shape: Sequence[int], sizes: Sequence[int], placements: Sequence[str]) -> tuple[int, ...]:
    """For each dimension the extent at which these placements cut it regularly; 0 where it is whole or cut irregularly.

    Regular means that every boundary between ranks is a multiple of the extent, and every multiple is such a
    boundary.
    """
    if len(sizes) != len(placements):
        raise LayoutUnsupported(f"placements {tuple(placements)} on a mesh of sizes {tuple(sizes)}")
    splits = _splits(placements, len(shape))
    return tuple(
        _regular(extent, tuple(sizes[axis] for axis, split in splits if split == dim)) for dim, extent in enumerate(shape)
    )


def is_cut_regularly(shape: Sequence[int], sizes: Sequence[int], placements: Sequence[str]) -> bool:
    """Whether every dimension that these placements cut into several parts is cut as `cuts_of` means it."""
    cuts = cuts_of(shape, sizes, placements)
    several = {dim for axis, dim in _splits(placements, len(shape)) if sizes[axis] > 1 and shape[dim] > 1}
    return all(cuts[dim] for dim in several)


def replica_ranks(mesh: Mesh, placements: Sequence[str], rank: int) -> tuple[int, ...]:
    """The ranks that hold the same box as `rank`, itself among them, in the order of the mesh.

    They differ from it on replicated axes only. Raises Malformed for a rank outside the mesh.
    """
    if len(mesh.sizes) != len(placements):
        raise LayoutUnsupported(f"placements {tuple(placements)} on mesh {mesh.name!r} of sizes {mesh.sizes}")
    coordinate = mesh.coordinate(rank)
    axes = [
        range(size) if placement == "R" else (index,)
        for size, index, placement in zip(mesh.sizes, coordinate, placements, strict=True)
    ]
    return tuple(mesh.ranks[_number_of(place, mesh.sizes)] for place in product(*axes))


def _number_of(coordinate: Sequence[int], sizes: Sequence[int]) -> int:
    at = 0
    for index, size in zip(coordinate, sizes, strict=True):
        at = at * size + index
    return at


@lru_cache(maxsize=1024)
def _splits(placements: tuple[str, ...], ndim: int) -> tuple[tuple[int, int], ...]:
    """(mesh axis, dimension) of every split, in the order in which they are applied."""
    plain: list[tuple[int, int]] = []
    strided: list[tuple[int, int]] = []
    for axis, placement in enumerate(placements):
        found = _PLACEMENT.fullmatch(placement)
        if found is None:
            raise LayoutUnsupported(f"placement {placement!r} on mesh axis {axis}: expected R, S(d) or _S(d)")
        if found[2] is None:
            continue
        dim = int(found[2])
        if dim >= ndim:
            raise LayoutUnsupported(f"placement {placement!r} on mesh axis {axis}: the array has {ndim} dimensions")
        (strided if found[1] else plain).append((axis, dim))
    return (*plain, *strided)


@lru_cache(maxsize=4096)
def _regular(extent: int, ways: tuple[int, ...]) -> int:
    """The extent of the regular grid that nested `torch.chunk` splits make, 0 if they make none or a grid of one."""
    counts = [count for count in ways if count > 1]
    if len(counts) == 1:  # all parts but the last one are alike, however many they are
        size = -(-extent // counts[0])
        return size if 0 < size < extent else 0
    intervals = [(0, extent)]
    for count in counts:
        intervals = [(low + a, low + b) for low, high in intervals for a, b in torch_chunk(high - low, count) if a < b]
    size = max((high - low for low, high in intervals), default=0)
    if len(intervals) < 2 or any(low % size for low, _ in intervals):
        return 0
    return size
