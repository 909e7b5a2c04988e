"""Reading boxes of stored tensors: from bytes with any strides to elements one after the other. [FOR-6]"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

from elastickpt.foreign.listing import StoredTensor, in_order
from elastickpt.format.arrays import Box
from elastickpt.storage.store import RangeReader

RUN_NBYTES = 4096  # from which on elements that lie end to end are read without what lies between them and the next

Bytes = NDArray[np.uint8]


def read_box(reader: RangeReader, tensor: StoredTensor, box: Box) -> Bytes:
    """The elements of a box in C order, as one row of bytes.

    Reads only bytes between the box's first and last element, in one piece where they lie close together, else in runs
    along the slowest dimensions; what lies between strided elements is read and left out. Raises WrongLength where the file
    has become shorter.
    """
    made = np.empty(box.count * tensor.itemsize, np.uint8)
    if made.size:
        size = tensor.itemsize
        first = tensor.start + size * sum(low * stride for low, stride in zip(box.start, tensor.strides, strict=True))
        _fill(reader, first, tensor.strides, made.reshape(*box.shape, size))
    return made


def read_tensor(reader: RangeReader, tensor: StoredTensor) -> Bytes:
    """All elements of a tensor in C order, as one row of bytes."""
    return read_box(reader, tensor, Box.whole(tensor.shape))


def read_tensor_into(reader: RangeReader, tensor: StoredTensor, made: Bytes) -> None:
    """Fills `made` with all elements of a tensor in C order, as `read_tensor` gives them."""
    if made.size:
        _fill(reader, tensor.start, tensor.strides, made.reshape(*tensor.shape, tensor.itemsize))


def ranges(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """The bytes [start, stop) of its file that reading all of it reads, in that order."""
    if tensor.count:
        yield from _ranges(tensor.start, tensor.shape, tensor.strides, tensor.itemsize)


def _ranges(start: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> Iterator[tuple[int, int]]:
    along = _steps_along(shape, strides, size)
    if along is None:
        yield start, start + _span(shape, strides) * size
        return
    inner = (shape[:along] + shape[along + 1 :], strides[:along] + strides[along + 1 :])
    for k in range(shape[along]):
        yield from _ranges(start + k * strides[along] * size, *inner, size)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _steps_along(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> int | None:
    """The dimension along which elements are read step by step; None where all are read at once."""
    span, count = _span(shape, strides), prod(shape)
    wide = [k for k, n in enumerate(shape) if n > 1]
    if span <= count or len(wide) <= 1:
        return None
    run = 1
    for k in sorted(wide, key=lambda k: strides[k]):
        if strides[k] != run:
            break
        run *= shape[k]
    if span <= 2 * count and run * size < RUN_NBYTES:
        return None
    return max(wide, key=lambda k: strides[k])


def _fill(reader: RangeReader, start: int, strides: tuple[int, ...], made: Bytes) -> None:
    """Fills `made`, of shape (*box, itemsize), from the element that begins at `start`."""
    shape, size = made.shape[:-1], made.shape[-1]
    along = _steps_along(shape, strides, size)
    if along is not None:
        rest = strides[:along] + strides[along + 1 :]
        rows = np.moveaxis(made, along, 0)
        for k in range(shape[along]):
            part = rows[k]
            at = part if part.flags.c_contiguous else np.empty(part.shape, np.uint8)
            _fill(reader, start + k * strides[along] * size, rest, at)
            if at is not part:
                part[...] = at
    elif in_order(shape, strides):
        reader.read_into(start, made.reshape(-1).data)
    else:
        data = np.empty(_span(shape, strides) * size, np.uint8)
        reader.read_into(start, data.data)
        made[...] = np.lib.stride_tricks.as_strided(
            data, shape=made.shape, strides=(*(stride * size for stride in strides), 1), writeable=False
        )
