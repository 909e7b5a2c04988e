"""The chunk grid of an array, C-order strides, and where in chunks the bytes of a box lie.

Zarr v3 stores every chunk with the full chunk shape, those at the array's end too; offsets and strides here are bytes
in a whole chunk, in C order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from operator import add, ge, gt, mul
from typing import NamedTuple

from elastickpt.errors import LimitExceeded, Malformed
from elastickpt.format.arrays import Box
from elastickpt.format.version import MAX_CHUNKS, MIB


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


CHUNK_NBYTES = 256 * MIB  # of the largest chunk that a writer makes


class ByteRun(NamedTuple):
    """A box inside one chunk, and its bytes there: `nbytes // row_nbytes` rows, `row_stride` from one to the next.

    `chunk` is the chunk's index on the grid, `box` is in global coordinates, `offset` is the first byte's place in
    the chunk. A contiguous box is one row: `row_nbytes == row_stride == nbytes`. The rows in order are the box in C
    order.
    """

    chunk: tuple[int, ...]
    box: Box
    offset: int
    nbytes: int
    row_nbytes: int
    row_stride: int

    @property
    def in_a_row(self) -> bool:
        """Whether nothing lies between its rows."""
        return self.row_nbytes in (self.row_stride, self.nbytes)

    def place(self, position: int) -> int:
        """Where its byte `position` lies, counted as `offset` is."""
        row, inside = divmod(position, self.row_nbytes)
        return self.offset + row * self.row_stride + inside

    def moved(self, by: int) -> ByteRun:
        """The same so many bytes later."""
        return ByteRun(self.chunk, self.box, self.offset + by, self.nbytes, self.row_nbytes, self.row_stride)


def chunk_shape(shape: Sequence[int], *, itemsize: int, cuts: Sequence[int] = ()) -> tuple[int, ...]:
    """The chunk shape of an array, a function of these arguments alone; at most 256 MiB a chunk, () for a 0-d array.

    `cuts[k]` > 0 is the extent at which the layout cuts axis k regularly, 0 is none; () is none anywhere. The rule:

    1. Each axis has its own extent, 1 where that is zero. An axis after the first that has a cut has the cut's
       extent, if that is smaller. A cut of the first axis is not used: rows of it are byte ranges of a chunk already.
    2. A step along an axis is the product of the extents of the axes after it, times the item size, in bytes. From
       the first axis on, as long as the step exceeds 256 MiB, the extent becomes 1.
    3. On the first axis whose step does not exceed 256 MiB, the extent becomes the number of whole steps in 256 MiB,
       if that is smaller. The axes after it stay as they are.
    4. If this makes more than 2^24 chunks, rules 1 to 3 are applied again without cuts.

    Raises LimitExceeded if there are more than 2^24 chunks even so.
    """
    if cuts and len(cuts) != len(shape):
        raise Malformed(f"cuts {tuple(cuts)} for an array of shape {tuple(shape)}: expected one an axis, or none")
    extents = [max(extent, 1) for extent in shape]
    for axis, cut in enumerate(cuts):
        if axis > 0 and cut > 0:
            extents[axis] = min(extents[axis], cut)
    step = prod(extents) * itemsize
    for axis, extent in enumerate(extents):
        step //= extent
        if step <= CHUNK_NBYTES:
            extents[axis] = min(extent, CHUNK_NBYTES // step)
            break
        extents[axis] = 1
    if chunk_count(shape, extents) <= MAX_CHUNKS:
        return tuple(extents)
    if any(cuts):
        return chunk_shape(shape, itemsize=itemsize)
    raise LimitExceeded(f"an array of shape {tuple(shape)} has more than {MAX_CHUNKS} chunks of {CHUNK_NBYTES} bytes")


def chunk_nbytes(chunk_shape: Sequence[int], *, itemsize: int) -> int:
    """Bytes of every chunk on the grid, those at the array's end too."""
    return prod(chunk_shape) * itemsize


def chunk_count(shape: Sequence[int], chunk_shape: Sequence[int]) -> int:
    """Number of chunks on the grid; 0 for an array without elements, 1 for a 0-d array."""
    return prod(-(-extent // step) for extent, step in zip(shape, chunk_shape, strict=True))


def chunks(shape: Sequence[int], chunk_shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Box]]:
    """(index on the grid, the part of the array in it) of every chunk, in C order."""
    counts = [range(-(-extent // step)) for extent, step in zip(shape, chunk_shape, strict=True)]
    for index in product(*counts):
        yield index, _chunk_box(index, shape, chunk_shape)


def _chunk_box(index: Sequence[int], shape: Sequence[int], chunk_shape: Sequence[int]) -> Box:
    start = tuple(k * step for k, step in zip(index, chunk_shape, strict=True))
    return Box(start, tuple(min(k + step, n) for k, step, n in zip(start, chunk_shape, shape, strict=True)))


def chunks_of(box: Box, *, shape: Sequence[int], chunk_shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Box]]:
    """The same of the chunks alone that a box, inside the array, has elements in."""
    if box.count:
        first = (low // step for low, step in zip(box.start, chunk_shape, strict=True))
        last = ((high - 1) // step for high, step in zip(box.stop, chunk_shape, strict=True))
        for index in product(*(range(low, high + 1) for low, high in zip(first, last, strict=True))):
            yield index, _chunk_box(index, shape, chunk_shape)


def runs_of(box: Box, *, shape: Sequence[int], chunk_shape: Sequence[int], itemsize: int) -> tuple[ByteRun, ...]:
    """The bytes of a box as runs, in C order of the chunks and then of the box; none for a box without elements.

    What of the box lies in one chunk is one run if its bytes are contiguous there, or rows of one stride; else it is
    split along its outer axes into as few runs as that allows. Raises Malformed for a box that reaches beyond the
    array.
    """
    if not len(box.start) == len(shape) == len(chunk_shape) or any(map(gt, box.stop, shape)):
        raise Malformed(f"box {box} in an array of shape {tuple(shape)} with chunks of {tuple(chunk_shape)}")
    if any(map(ge, box.start, box.stop)):
        return ()
    first = tuple(low // step for low, step in zip(box.start, chunk_shape, strict=True))
    last = tuple((high - 1) // step for high, step in zip(box.stop, chunk_shape, strict=True))
    if first == last:
        return tuple(_runs_in(first, box, chunk_shape, itemsize))
    runs: list[ByteRun] = []
    for chunk in product(*(range(low, high + 1) for low, high in zip(first, last, strict=True))):
        start = tuple(max(low, k * step) for low, k, step in zip(box.start, chunk, chunk_shape, strict=True))
        stop = tuple(min(high, (k + 1) * step) for high, k, step in zip(box.stop, chunk, chunk_shape, strict=True))
        runs.extend(_runs_in(chunk, Box(start, stop), chunk_shape, itemsize))
    return tuple(runs)


def _runs_in(chunk: tuple[int, ...], box: Box, chunk_shape: Sequence[int], itemsize: int) -> Iterator[ByteRun]:
    """The runs of a box that lies inside one chunk."""
    extents, strides = box.shape, c_strides(chunk_shape, itemsize)
    offset = sum((low - k * n) * s for low, k, n, s in zip(box.start, chunk, chunk_shape, strides, strict=True))
    axis, count = fold(extents, strides, below=len(extents), stride=itemsize)
    nbytes = row = stride = count * itemsize
    if axis:
        stride = strides[axis - 1]
        axis, rows = fold(extents, strides, below=axis, stride=stride)
        nbytes = rows * row
    for index, slice_box in slices(box, axis):
        yield ByteRun(chunk, slice_box, offset + sum(map(mul, index, strides)), nbytes, row, stride)
