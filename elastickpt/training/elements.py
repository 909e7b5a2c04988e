"""Element types of torch by the names zarr knows.

What has no registered name is stored as its bytes: `uint8`, with an axis of `itemsize` appended where that is more than
one, and the attribute `stored_as`. [UCF-23]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.parameter import is_lazy

from elastickpt.errors import ValueNotCarried
from elastickpt.format.arrays import DTYPES
from elastickpt.format.values import Value
from elastickpt.training.loaded import is_loaded_instance
from elastickpt.training.strides import Order, order_of

Attributes = tuple[tuple[str, Value], ...]


PLAIN = (torch.Tensor, torch.nn.Parameter)  # classes of tensors that are nothing but one


@dataclass(frozen=True, slots=True, eq=False)
class Elements:
    """A local tensor's memory in an element type that zarr knows; `tail` are the axes appended to its shape."""

    tensor: torch.Tensor
    dtype: str
    tail: tuple[int, ...]
    attributes: Attributes
    order: Order


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
    else:
        return
    raise ValueNotCarried(f"tensor {where} {reason}")


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or what an asynchronous collective left in it once that is complete."""
    if type(tensor) in PLAIN:
        return tensor
    if is_loaded_instance(tensor, "torch.distributed._functional_collectives", "AsyncCollectiveTensor"):
        done: torch.Tensor = tensor.wait()  # type: ignore[attr-defined]
        return done
    return tensor
