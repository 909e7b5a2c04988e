"""Reading boxes of stored tensors: from bytes with any strides to elements one after the other. [FOR-6]"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from elastickpt.foreign.listing import StoredTensor, in_order
from elastickpt.format.arrays import Box
from elastickpt.storage.store import RangeReader

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


def _fill(reader: RangeReader, start: int, strides: tuple[int, ...], made: Bytes) -> None:
    """Fills `made`, of shape (*box, itemsize), from the element that begins at `start`."""
    shape, size = made.shape[:-1], made.shape[-1]
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    count = prod(shape)
    if span == count and in_order(shape, strides):
        reader.read_into(start, made.reshape(-1).data)
    elif span <= 2 * count or len([n for n in shape if n > 1]) <= 1:
        data = np.empty(span * size, np.uint8)
        reader.read_into(start, data.data)
        made[...] = np.lib.stride_tricks.as_strided(
            data, shape=made.shape, strides=(*(stride * size for stride in strides), 1), writeable=False
        )
    else:
        slowest = max((k for k, n in enumerate(shape) if n > 1), key=lambda k: strides[k])
        rest = tuple(stride for k, stride in enumerate(strides) if k != slowest)
        along = np.moveaxis(made, slowest, 0)
        for k in range(shape[slowest]):
            part = np.empty(along[k].shape, np.uint8)
            _fill(reader, start + k * strides[slowest] * size, rest, part)
            along[k] = part
