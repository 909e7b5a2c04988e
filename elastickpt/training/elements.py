"""The memory of a tensor: its element type by zarr's name, the order of its axes, and its bits as a numpy array.

An element type without registered name is stored as its bytes: `uint8`, with an axis of `itemsize` appended where that is more
than one, and the attribute `stored_as`. [UCF-23] The order of axes is carried, so that what is made anew lies as it lay:
`torch.linalg.qr` gives its Q column by column, and a product with it has other last bits than one with a copy row by row. An
*order* is all axes by falling stride; () is their own order. [UCF-104] Host memory is seen as words without a copy.

What was filled behind autograd's back must count as changed: a forward that ran before a load saved tensors for its backward.
Their contents are others now, so that backward must fail, as it does after `load_state_dict`, and not compute wrong gradients.

Some parts of torch matter only once their module has been imported by somebody else: an object cannot be an instance of a class
whose module was never imported, so asking costs nothing, while importing `torch._dynamo` or `torch.distributed.tensor` only to
say "no" would cost seconds at every start.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from operator import attrgetter, ge
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy
import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import NDArray
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from elastickpt.errors import ValueNotCarried
from elastickpt.format.arrays import DTYPES
from elastickpt.format.memory_views import Memory, bytes_at
from elastickpt.format.values import Value


def loaded_module(name: str) -> ModuleType | None:
    """The module `name` if it has been imported in this process, else None."""
    return sys.modules.get(name)


def loaded_type(module: str, name: str) -> type[Any] | None:
    """The class `name` of `module` if that module has been imported in this process, else None."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def is_loaded_instance(value: object, module: str, name: str) -> bool:
    """Whether `value` is an instance of the class `name` of `module`; false when that module was never imported."""
    cls = loaded_type(module, name)
    return cls is not None and isinstance(value, cls)


DimOrder = tuple[int, ...]


def axis_order(shape: Sequence[int], strides: Sequence[int]) -> DimOrder:
    """The order of axes of these extents and strides; axes of one element may stand anywhere, and make no difference."""
    wide = [strides[axis] for axis, extent in enumerate(shape) if extent > 1]
    if all(one >= other for one, other in pairwise(wide)) or 0 in shape:
        return ()
    return tuple(sorted(range(len(shape)), key=lambda axis: -strides[axis]))


def order_of(tensor: torch.Tensor) -> DimOrder:
    """The order of a strided tensor's axes."""
    return () if tensor.ndim < 2 or tensor.is_contiguous() else axis_order(tensor.shape, tensor.stride())


def empty_in_order(shape: Sequence[int], order: DimOrder, *, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """An uninitialised tensor without gaps, whose axes lie in this order."""
    if not order:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    inner = torch.empty([shape[axis] for axis in order], dtype=dtype, device=device)
    return inner.permute([order.index(axis) for axis in range(len(order))])


def in_order(tensor: torch.Tensor, order: DimOrder) -> torch.Tensor:
    """The tensor, or a copy of it whose axes lie in this order."""
    return empty_in_order(tensor.shape, order, dtype=tensor.dtype, device=tensor.device).copy_(tensor) if order else tensor


def numpy_in_order(array: npt.NDArray[numpy.generic], order: DimOrder) -> npt.NDArray[numpy.generic]:
    """The same for an array of numpy."""
    if not order:
        return array
    back = [order.index(axis) for axis in range(len(order))]
    return numpy.ascontiguousarray(array.transpose(order)).transpose(back)


Attributes = tuple[tuple[str, Value], ...]


PLAIN = (torch.Tensor, torch.nn.Parameter)  # classes of tensors that are nothing but one
_PLAIN_TYPES = frozenset(PLAIN)


@dataclass(frozen=True, slots=True, eq=False)
class Elements:
    """A local tensor's memory in an element type that zarr knows; `tail` are the axes appended to its shape."""

    tensor: torch.Tensor
    dtype: str
    tail: tuple[int, ...]
    attributes: Attributes
    order: DimOrder


@cache
def dtype_name(dtype: torch.dtype) -> str | None:
    """zarr's name of an element type; None for one that is stored as bytes."""
    name = str(dtype).removeprefix("torch.")
    return name if name in DTYPES else None


def torch_dtype(name: str) -> torch.dtype:
    """The element type with this zarr name. Raises ValueNotCarried where this torch has none."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueNotCarried(f"torch {torch.__version__} has no element type {name!r}")
    return found


def elements_of(tensor: torch.Tensor, *, where: object) -> Elements:
    """A view of `tensor` (plain, local) to be read or filled in place; it shares memory and is outside autograd.

    Raises ValueNotCarried, naming `where`, for what has no memory of its own or no strides.
    """
    _require_memory(tensor, where)
    view = tensor.detach()
    name = dtype_name(tensor.dtype)
    if name is not None:
        return Elements(view, name, (), (), order_of(view))
    view = view.unsqueeze(-1).view(torch.uint8)
    tail: tuple[int, ...] = (tensor.dtype.itemsize,)
    if tensor.dtype.itemsize == 1:
        view, tail = view.squeeze(-1), ()
    return Elements(view, "uint8", tail, (("stored_as", str(tensor.dtype).removeprefix("torch.")),), order_of(view))


def _require_memory(tensor: torch.Tensor, where: object) -> None:
    if is_lazy(tensor):
        reason = "is not initialised yet: run the lazy module once before"
    elif tensor.is_meta:
        reason = "is on the meta device and has no contents"
    elif tensor.is_nested:
        reason = "is a nested tensor"
    elif tensor.layout is not torch.strided:
        reason = f"has layout {tensor.layout}, expected torch.strided"
    elif tensor.is_quantized:
        reason = f"is quantised ({tensor.dtype}): its scales have no place in an array; use a tensor subclass"
    elif tensor.is_conj() or tensor.is_neg():
        reason = "is a lazy conjugate or negation: call resolve_conj() or resolve_neg()"
    elif not has_memory(tensor):
        reason = f"has elements and no memory: its storage was resized to {tensor.untyped_storage().nbytes()} bytes"
    else:
        return
    raise ValueNotCarried(f"tensor {where} {reason}")


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether the storage of a plain strided tensor holds all its elements: some libraries free it, and keep the tensor."""
    if type(tensor) not in PLAIN or tensor.numel() == 0:
        return True
    if tensor.is_contiguous():
        return tensor.untyped_storage().nbytes() >= tensor.storage_offset() * tensor.itemsize + tensor.nbytes
    reach = 1 + sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + reach) * tensor.element_size()


_LIE = attrgetter("layout", "is_nested", "is_meta", "is_quantized")
_IS_CPU = attrgetter("is_cpu")
_NBYTES, _ITEMSIZE = attrgetter("nbytes"), attrgetter("itemsize")
_PLAINLY = (torch.strided, False, False, False)


def lie_plainly(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether these are plain tensors in memory, of which each element is as it stands there, and that are placed nowhere."""
    if not set(map(type, tensors)) <= _PLAIN_TYPES or set(map(_LIE, tensors)) != {_PLAINLY}:
        return False
    if any(map(torch.Tensor.is_neg, tensors)) or any(map(torch.Tensor.is_conj, tensors)):
        return False
    return all(getattr(tensor, "_st_info", None) is None for tensor in tensors) and have_memory(tensors)


def lie_in_order(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors that `lie_plainly` stand in host memory without gaps, in C order."""
    return all(map(_IS_CPU, tensors)) and all(map(torch.Tensor.is_contiguous, tensors))


def have_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """`has_memory` of many plain strided tensors."""
    if not all(map(torch.Tensor.is_contiguous, tensors)):
        return all(map(has_memory, tensors))
    room = list(map(torch.UntypedStorage.nbytes, map(torch.Tensor.untyped_storage, tensors)))
    offsets, needed = list(map(torch.Tensor.storage_offset, tensors)), list(map(_NBYTES, tensors))
    if not any(offsets):
        return all(map(ge, room, needed))
    rows = zip(room, offsets, map(_ITEMSIZE, tensors), needed, strict=True)
    return all(nbytes >= offset * itemsize + own or not own for nbytes, offset, itemsize, own in rows)


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or what an asynchronous collective left in it once that is complete."""
    if type(tensor) in PLAIN:
        return tensor
    if is_loaded_instance(tensor, "torch.distributed._functional_collectives", "AsyncCollectiveTensor"):
        done: torch.Tensor = tensor.wait()  # type: ignore[attr-defined]
        return done
    return tensor


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
    if tensor.is_contiguous() and has_memory(tensor):
        elements: NDArray[np.generic] = np.asarray(Memory(tensor.data_ptr(), tuple(tensor.shape), words.str, owner=tensor))
        return elements
    storage = tensor.untyped_storage()
    memory = bytes_at(storage.data_ptr(), storage.nbytes(), tensor)
    itemsize = tensor.element_size()
    return np.ndarray(
        tuple(tensor.shape),
        dtype=words,
        buffer=memory,
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
    return tensor.data_ptr() if tensor.is_cpu and tensor.is_contiguous() else None


def addresses_of(tensors: Sequence[torch.Tensor]) -> NDArray[np.int64]:
    """Where the elements of tensors begin that `lie_in_order`; valid while they live."""
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), dtype=np.int64, count=len(tensors))


def fill_device(tensor: torch.Tensor, host: NDArray[np.generic]) -> None:
    """Copies bits that `host_elements` spells to a tensor on a device; blocking."""
    if tensor.numel():
        words = torch.from_numpy(np.ascontiguousarray(host).reshape(-1).view(np.uint8))
        tensor.copy_(words.view(tensor.dtype).reshape(tensor.shape))


def mark_changed(tensors: Iterable[torch.Tensor]) -> None:
    """Tells autograd that the contents of these tensors changed; a view tells it of its base too."""
    changed = tuple(tensors)
    if any(map(torch.Tensor.is_inference, changed)):  # such a tensor has no version, and no graph may keep it
        changed = tuple(tensor for tensor in changed if not tensor.is_inference())
    increment_version(changed)
