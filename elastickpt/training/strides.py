"""The order of a tensor's axes in memory: carried, so that what is made anew lies as it lay. [UCF-104]

`torch.linalg.qr` gives its Q column by column, and a product with it has other last bits than one with a copy row by row.
An *order* is all axes by falling stride; () is their own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy
import numpy.typing as npt
import torch

Order = tuple[int, ...]


def axis_order(shape: Sequence[int], strides: Sequence[int]) -> Order:
    """The order of axes of these extents and strides; axes of one element may stand anywhere, and make no difference."""
    wide = [strides[axis] for axis, extent in enumerate(shape) if extent > 1]
    if all(one >= other for one, other in pairwise(wide)) or 0 in shape:
        return ()
    return tuple(sorted(range(len(shape)), key=lambda axis: -strides[axis]))


def order_of(tensor: torch.Tensor) -> Order:
    """The order of a strided tensor's axes."""
    return () if tensor.ndim < 2 or tensor.is_contiguous() else axis_order(tensor.shape, tensor.stride())


def empty_in_order(shape: Sequence[int], order: Order, *, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """An uninitialised tensor without gaps, whose axes lie in this order."""
    if not order:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    inner = torch.empty([shape[axis] for axis in order], dtype=dtype, device=device)
    return inner.permute([order.index(axis) for axis in range(len(order))])


def in_order(tensor: torch.Tensor, order: Order) -> torch.Tensor:
    """The tensor, or a copy of it whose axes lie in this order."""
    return empty_in_order(tensor.shape, order, dtype=tensor.dtype, device=tensor.device).copy_(tensor) if order else tensor


def numpy_in_order(array: npt.NDArray[numpy.generic], order: Order) -> npt.NDArray[numpy.generic]:
    """The same for an array of numpy."""
    if not order:
        return array
    back = [order.index(axis) for axis in range(len(order))]
    return numpy.ascontiguousarray(array.transpose(order)).transpose(back)
