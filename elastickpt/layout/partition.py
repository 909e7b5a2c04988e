"""Splits of one extent into `ways` intervals, flat ranges of a box as boxes, and which part of a box each replica writes.

A split is exactly `ways` half-open intervals `(start, stop)` in order, adjacent, covering `[0, extent)`; what is
empty at the end is `(extent, extent)`. All counts are in elements. What a replica writes is a function of box and replica
number, so that nobody has to ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from elastickpt.errors import LayoutUnsupported, Malformed
from elastickpt.format.arrays import Box
from elastickpt.format.limits import MIB

Split = tuple[tuple[int, int], ...]


def even(extent: int, ways: int) -> Split:
    """Equal intervals. Raises LayoutUnsupported when the extent leaves a remainder."""
    _check(extent, ways)
    size, remainder = divmod(extent, ways)
    if remainder:
        raise LayoutUnsupported(f"an extent of {extent} cannot be split evenly {ways} ways: {remainder} left over")
    return tuple((k * size, (k + 1) * size) for k in range(ways))


def torch_chunk(extent: int, ways: int) -> Split:
    """The intervals of `torch.chunk`, padded to `ways`: ceil(extent / ways) each, trailing ones shorter or empty."""
    _check(extent, ways)
    size = -(-extent // ways)
    return tuple((min(k * size, extent), min((k + 1) * size, extent)) for k in range(ways))


def explicit(extent: int, sizes: Sequence[int]) -> Split:
    """Intervals of these sizes. Raises LayoutUnsupported when one is negative or their sum is not the extent."""
    if any(size < 0 for size in sizes) or sum(sizes) != extent:
        raise LayoutUnsupported(f"sizes {tuple(sizes)} add up to {sum(sizes)}, the extent to split is {extent}")
    return tuple(pairwise(accumulate(sizes, initial=0)))


def balanced(extent: int, ways: int) -> Split:
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
