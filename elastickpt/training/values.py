"""Plain values of live state: copied, refused with their place, turned back into torch and numpy objects.

How containers are walked is in `trees`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import ml_dtypes
import numpy
import torch

from elastickpt.errors import ValueNotCarried
from elastickpt.format.arrays import DTYPES
from elastickpt.format.values import (
    ArrayReference,
    ArrayValue,
    DeviceValue,
    DtypeValue,
    EnumValue,
    NamedTupleValue,
    StateReference,
    Value,
)
from elastickpt.format.version import MAX_SMALL_ARRAY_NBYTES
from elastickpt.training.elements import axis_order, in_order, numpy_in_order, order_of, torch_dtype
from elastickpt.training.trees import ATOMS, holds_arrays, mapped, named_tuple_of, place_of, token, type_name

__all__ = [
    "array_value",
    "carried",
    "carried_leaf",
    "holds_arrays",
    "mapped",
    "place_of",
    "revived",
    "revived_leaf",
    "scalar_values",
    "shown",
    "tensor_of",
    "token",
]

_TORCH = {name: getattr(torch, name) for name in DTYPES}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}
_CARRIED = (ArrayValue, ArrayReference, StateReference, DtypeValue, DeviceValue, EnumValue)
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def shown(value: object) -> str:
    """A value in a message: its repr, cut to 80 characters."""
    if isinstance(value, (torch.Tensor, numpy.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, (ArrayReference, StateReference)):
        return "a tensor"
    if isinstance(value, NamedTupleValue):
        return f"a named tuple {value.type}"
    if isinstance(value, EnumValue):
        return f"{value.type}.{value.name}"
    if isinstance(value, DtypeValue):
        return f"torch.{value.name}"
    if isinstance(value, (ArrayValue, DeviceValue)):
        value = revived(value)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def carried(value: object, place: str) -> Value:
    """A copy that shares nothing with `value`; small tensors and numpy arrays become ArrayValues.

    Raises ValueNotCarried, with the place, for everything else: functions, modules, tensors over 64 KiB, subclasses of
    the plain types.
    """
    return mapped(value, place, carried_leaf)


def carried_option(value: object, place: str) -> Value:
    """`carried` for an option of a param group: a member of an enumeration too, by its name."""
    if isinstance(value, Enum) and value.name in type(value).__members__:
        return EnumValue(type_name(type(value)), value.name)
    return carried(value, place)


def member_of(live: object, found: EnumValue) -> Enum | None:
    """The member with that name of the class of `live`; None if that is another class, or has no such member."""
    if not isinstance(live, Enum) or type_name(type(live)) != found.type:
        return None
    return type(live).__members__.get(found.name)


def carried_leaf(value: object, place: str) -> Value:
    """`carried` for what is no container."""
    if type(value) in ATOMS or type(value) in _CARRIED:
        return value
    if isinstance(value, torch.dtype):
        return DtypeValue(str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return DeviceValue(str(value))
    if isinstance(value, torch.Tensor):
        return _of_tensor(value, place)
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return _of_numpy(numpy.asarray(value), place)
    raise ValueNotCarried(
        f"value {place}: {_kind(value)} cannot be carried by a checkpoint{_advice(value)}; expected None, bool, int, float, "
        f"complex, str, bytes, a list, tuple, set, dict, Counter, OrderedDict, deque, defaultdict, named tuple, tensor, "
        f"torch.dtype, torch.device, or, at the top of `state`, an object with state_dict and load_state_dict"
    )


def _kind(value: object) -> str:
    return f"{type_name(type(value))} {getattr(value, '__qualname__', '')}".strip()


def _advice(value: object) -> str:
    """What can be done with an object where only plain values are carried."""
    if hasattr(value, "state_dict"):
        return " from inside a value: put it at the top of `state`"
    if is_dataclass(value):
        return ": keep its fields in a dict (dataclasses.asdict), and make it from them again"
    if callable(value) or type(value).__module__ == "builtins":
        return ""
    return (
        ": keep what it is made of in plain values, and make it from them again; where another library keeps it, put an object "
        "around what has it into `state`, whose state_dict and load_state_dict do that"
    )


def _small(nbytes: int, place: str) -> None:
    if nbytes > MAX_SMALL_ARRAY_NBYTES:
        raise ValueNotCarried(
            f"value {place}: an array of {nbytes} bytes inside a value that is carried whole, expected at most "
            f"{MAX_SMALL_ARRAY_NBYTES}; put it into `state` as a tensor"
        )


def array_value(tensor: torch.Tensor) -> ArrayValue:
    """The bits of a plain strided tensor, whatever its device.

    Raises ValueNotCarried for an element type without a name.
    """
    if tensor.dtype not in _NAMES:
        raise ValueNotCarried(f"tensors of {tensor.dtype} cannot be carried inside a value")
    plain = tensor.detach().cpu().contiguous()
    data = plain.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy().tobytes()
    return ArrayValue(_NAMES[tensor.dtype], tuple(tensor.shape), data, "torch", order_of(tensor))


def _of_tensor(tensor: torch.Tensor, place: str) -> ArrayValue:
    if type(tensor) not in _PLAIN_TENSORS or tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueNotCarried(
            f"value {place}: a {type(tensor).__name__} ({tensor.layout}, on {tensor.device}) inside a value that is "
            f"carried whole, expected a plain tensor"
        )
    if tensor.dtype not in _NAMES:
        raise ValueNotCarried(f"value {place}: tensors of {tensor.dtype} cannot be carried inside a value")
    _small(tensor.numel() * tensor.element_size(), place)
    return array_value(tensor)


def _of_numpy(array: numpy.ndarray[Any, Any], place: str) -> ArrayValue:
    if array.dtype.name not in DTYPES:
        raise ValueNotCarried(f"value {place}: numpy arrays of {array.dtype} cannot be carried by a checkpoint")
    _small(array.nbytes, place)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return ArrayValue(array.dtype.name, array.shape, little.tobytes(), "numpy", axis_order(array.shape, array.strides))


def scalar_values(tensors: Sequence[torch.Tensor]) -> list[ArrayValue]:
    """`array_value` of 0-d tensors, with one copy from each device and element type instead of one a tensor."""
    found: list[ArrayValue | None] = [None] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device.type == "cpu":
            found[index] = array_value(tensor)
        else:
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in groups.values():
        together = torch.stack([tensors[index].detach() for index in indices]).cpu()
        for index, one in zip(indices, together, strict=True):
            found[index] = array_value(one)
    return [one for one in found if one is not None]


def tensor_of(value: ArrayValue, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """A new tensor with the value's bits."""
    if not value.data:  # torch.frombuffer refuses an empty buffer
        return torch.empty(value.shape, dtype=_TORCH[value.dtype], device=device)
    made = torch.frombuffer(bytearray(value.data), dtype=_TORCH[value.dtype]).reshape(value.shape)
    return in_order(made, value.order).to(device)


def _numpy_of(value: ArrayValue) -> object:
    dtype = getattr(ml_dtypes, value.dtype, None) or numpy.dtype(value.dtype)
    array = numpy_in_order(numpy.frombuffer(bytearray(value.data), dtype=dtype).reshape(value.shape), value.order)
    return array[()]  # a 0-d array comes back as a numpy scalar, which is what nearly all were


def revived_leaf(value: Value, device: torch.device | str = "cpu") -> object:
    """The torch or numpy object that an ArrayValue, a DtypeValue or a DeviceValue was; anything else as it is.

    Raises ValueNotCarried for an element type or a device that this torch does not know.
    """
    if isinstance(value, DtypeValue):
        return torch_dtype(value.name)
    if isinstance(value, DeviceValue):
        return _device(value.name)
    if type(value) is not ArrayValue:
        return value
    return tensor_of(value, device=device) if value.origin == "torch" else _numpy_of(value)


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueNotCarried(f"torch {torch.__version__} has no device {name!r}") from error


def revived(value: Value, *, device: torch.device | str = "cpu", place: str = "") -> object:
    """A copy of `value` with tensors (on `device`) and numpy arrays where ArrayValues stand, dtypes, devices and named tuples
    where they were. Raises ValueNotCarried as `named_tuple_of` does; `place` is for its message."""
    return mapped(value, place, lambda one, where: revived_leaf(one, device), named_tuple_of)
