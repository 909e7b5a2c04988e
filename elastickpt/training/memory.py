"""The memory of a tensor as a numpy array of its bits: no copy for host memory, any strides, every element type."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from elastickpt.training.elements import torch_dtype

# numpy lacks bfloat16 and the 8-bit floats, and a copy of bits needs no arithmetic: unsigned words of the same size do
_WORDS: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
    16: np.dtype("<c16"),
}


def host_tensor(dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """A new tensor in host memory, its elements still to be filled, of the type with this zarr name. Raises ValueNotCarried."""
    return torch.empty(tuple(shape), dtype=torch_dtype(dtype))


def host_elements(tensor: torch.Tensor) -> NDArray[np.generic]:
    """shape = the tensor's: its elements as words of their size. For host memory a writable view that keeps the tensor
    alive; for a device a fresh copy, made before this returns."""
    if tensor.device.type != "cpu":
        tensor = tensor.to("cpu")
    words = _WORDS[tensor.element_size()]
    if tensor.numel() == 0:
        return np.empty(tuple(tensor.shape), dtype=words)
    storage = tensor.untyped_storage()
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    memory._tensor = tensor  # type: ignore[attr-defined]  # the array's base is `memory`, which so keeps the storage
    itemsize = tensor.element_size()
    return np.ndarray(
        tuple(tensor.shape),
        dtype=words,
        buffer=memory,  # type: ignore[arg-type]  # the stub does not know that ctypes arrays are buffers
        offset=tensor.storage_offset() * itemsize,
        strides=tuple(stride * itemsize for stride in tensor.stride()),
    )


def tensor_over(array: NDArray[Any]) -> torch.Tensor:
    """A tensor over the memory of an array of numpy; over a copy of it where torch has no such memory (read only, another byte
    order, reversed)."""
    dtype: torch.dtype = getattr(torch, array.dtype.name)
    itemsize = array.dtype.itemsize
    if any(stride < 0 or stride % itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    array = array.astype(array.dtype.newbyteorder("="), order="K", copy=not array.flags.writeable)
    words = array if array.dtype.isbuiltin == 1 else array.view(_WORDS[itemsize])
    return torch.from_numpy(words).view(dtype)


def shares(array: NDArray[Any]) -> bool:
    """Whether `tensor_over` gives a tensor over the very memory of an array of numpy."""
    fits = all(stride >= 0 and stride % array.dtype.itemsize == 0 for stride in array.strides)
    return bool(fits and array.flags.writeable and array.dtype.isnative)


def numpy_over(tensor: torch.Tensor) -> NDArray[Any]:
    """An array of numpy over the memory of a tensor in host memory."""
    name = str(tensor.dtype).removeprefix("torch.")
    return host_elements(tensor).view(getattr(ml_dtypes, name, None) or np.dtype(name))


def host_range(tensor: torch.Tensor, first: int, last: int) -> tuple[NDArray[np.generic], int, int]:
    """Elements, and which of them in C order are the tensor's [first, last): of a device only those are copied."""
    if tensor.device.type == "cpu":
        return host_elements(tensor), first, last
    return host_elements(tensor.reshape(-1)[first:last]), 0, last - first


def host_address(tensor: torch.Tensor) -> int | None:
    """Where its elements begin, if they lie in host memory without gaps, in C order; else None. Valid while it lives."""
    return tensor.data_ptr() if tensor.device.type == "cpu" and tensor.is_contiguous() else None


def fill_device(tensor: torch.Tensor, host: NDArray[np.generic]) -> None:
    """Copies bits that `host_elements` spells to a tensor on a device; blocking."""
    if tensor.numel():
        words = torch.from_numpy(np.ascontiguousarray(host).reshape(-1).view(np.uint8))
        tensor.copy_(words.view(tensor.dtype).reshape(tensor.shape))
