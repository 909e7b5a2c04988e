"""Bytes of a local tensor in C order, a range at a time, whatever its strides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from elastickpt.format.arrays import Box

DIGEST_NBYTES = 1 << 20  # a multiple of every element size

Bytes = NDArray[np.uint8]
Elements = NDArray[np.generic]


def part_of(elements: Elements, box: Box) -> Elements:
    """A view of the box, in the elements' own coordinates."""
    return elements[tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))]


def flat_bytes(elements: Elements) -> Bytes | None:
    """The elements as one byte array without a copy; None if they are not contiguous in C order."""
    if not elements.flags.c_contiguous:
        return None
    return elements.reshape(-1).view(np.uint8)


def gather(elements: Elements, start: int, into: Bytes) -> None:
    """Fills `into` with the bytes from byte `start` of the elements in C order. Both are multiples of the element size."""
    itemsize = elements.dtype.itemsize
    _gather(elements, start // itemsize, into.view(elements.dtype))


def _gather(elements: Elements, start: int, into: Elements) -> None:
    count = into.size
    if count == 0:
        return
    if elements.ndim <= 1 or elements.size == count:
        flat = elements.reshape(-1) if elements.ndim == 0 else elements
        if elements.ndim <= 1:
            into[:] = flat[start : start + count]
        else:
            np.copyto(into.reshape(elements.shape), elements)
        return
    row = elements[0].size
    first, skip = divmod(start, row)
    filled = 0
    if skip:  # the rest of a row that an earlier range began
        filled = min(row - skip, count)
        _gather(elements[first], skip, into[:filled])
        first += 1
    rows = (count - filled) // row
    if rows:
        target = into[filled : filled + rows * row].reshape((rows, *elements.shape[1:]))
        np.copyto(target, elements[first : first + rows])
        filled += rows * row
    if filled < count:
        _gather(elements[first + rows], 0, into[filled:])


def range_digest(elements: Elements, first: int, last: int) -> bytes:
    """xxh3-128 of the bytes of elements [first, last) in C order, whatever the strides."""
    hasher, itemsize = xxh3_128(), elements.dtype.itemsize
    begin, end = first * itemsize, last * itemsize
    flat = flat_bytes(elements)
    if flat is not None:
        hasher.update(flat[begin:end].data)
        return hasher.digest()
    buffer = np.empty(min(end - begin, DIGEST_NBYTES), dtype=np.uint8)
    for start in range(begin, end, DIGEST_NBYTES):
        part = buffer[: min(DIGEST_NBYTES, end - start)]
        gather(elements, start, part)
        hasher.update(part.data)
    return hasher.digest()
