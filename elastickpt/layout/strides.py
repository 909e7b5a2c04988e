"""C-order strides, and how far a part of an array lies regularly in them. Strides are in bytes here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from operator import add

from elastickpt.format.box import Box


def c_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Bytes from one element to the next along each axis of an array in C order."""
    strides = []
    for extent in reversed(shape):
        strides.append(itemsize)
        itemsize *= extent
    return tuple(reversed(strides))


def fold(extents: Sequence[int], strides: Sequence[int], *, below: int, stride: int) -> tuple[int, int]:
    """(axis, count): the axes from `axis` up to `below`, walked in C order, are `count` steps of one `stride`.

    As many axes as possible, from `below` outwards: an axis belongs to them if it has one index only, or if its own
    stride continues the walk. `extents` are those of the part, `strides` those of the array around it.

    A part of 2 x 3 x 4 elements, of 1 byte each, in an array of 5 x 3 x 6: rows of 4 bytes, then 6 rows with stride
    6: fold((2, 3, 4), (18, 6, 1), below=3, stride=1) -> (2, 4) fold((2, 3, 4), (18, 6, 1), below=2, stride=6) -> (0,
    6)
    """
    axis, count = below, 1
    while axis and (extents[axis - 1] == 1 or strides[axis - 1] == count * stride):
        axis -= 1
        count *= extents[axis]
    return axis, count


def slices(box: Box, axis: int) -> Iterator[tuple[tuple[int, ...], Box]]:
    """(index, the box there) for every index, relative to the box, of the axes before `axis`; axis 0: itself, at ()."""
    for index in product(*map(range, box.shape[:axis])):
        start = (*map(add, box.start, index), *box.start[axis:])
        yield index, Box(start, (*(low + 1 for low in start[:axis]), *box.stop[axis:]))
