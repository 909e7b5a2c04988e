"""Plain values of live state: copied, refused with their place, turned back into torch and numpy objects.

A *place* is the JSON pointer of a value: the key of `state`, then one token a level (`/loader/sampler/3`). Containers
are list, tuple, set, frozenset, dict, OrderedDict and Counter, of exactly these types: a subclass would come back as
another type. `torch.Size` counts as tuple.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import ml_dtypes
import numpy
import torch

from elastickpt.errors import ValueNotCarried
from elastickpt.format.dtypes import DTYPES
from elastickpt.format.limits import MAX_DEPTH, MAX_SMALL_ARRAY_NBYTES
from elastickpt.format.values import ArrayReference, ArrayValue, Value

Leaf = Callable[[object, str], object]

_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_DICTS = (dict, OrderedDict, Counter)
_TORCH = {name: getattr(torch, name) for name in DTYPES}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def token(name: object) -> str:
    """One token of a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")


def place_of(*names: object) -> str:
    """The JSON pointer with these tokens: ("a", "b/c") -> "/a/b~1c"."""
    return "".join(f"/{token(name)}" for name in names)


def shown(value: object) -> str:
    """A value in a message: its repr, cut to 80 characters."""
    if isinstance(value, (torch.Tensor, numpy.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
    if type(value) is ArrayReference:
        return "a tensor"
    if type(value) is ArrayValue:
        value = revived(value)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def mapped(value: object, place: str, leaf: Leaf) -> object:
    """A copy of `value` in which `leaf(element, its place)` stands for everything that is no container.

    Raises ValueNotCarried for nesting beyond the limit (so also for a container inside itself) and for keys or set
    elements that are no plain hashable values.
    """
    return _mapped(value, place, leaf, 0)


def _mapped(value: object, place: str, leaf: Leaf, depth: int) -> object:
    kind = type(value)
    if kind not in _CONTAINERS:
        return leaf(value, place)
    if depth >= MAX_DEPTH:
        raise ValueNotCarried(f"value {place}: nested more than {MAX_DEPTH} deep, or inside itself")
    if isinstance(value, dict):
        made = cast(dict[object, object], kind())
        for key, one in value.items():
            made[_key(key, place)] = _mapped(one, f"{place}/{token(key)}", leaf, depth + 1)
        return made
    if isinstance(value, (set, frozenset)):
        return type(value)(_key(one, place) for one in value)
    elements = [_mapped(one, f"{place}/{k}", leaf, depth + 1) for k, one in enumerate(cast(Sequence[object], value))]
    return elements if kind is list else tuple(elements)


_CONTAINERS = frozenset((*_DICTS, list, tuple, torch.Size, set, frozenset))


def _key(key: object, place: str) -> Hashable:
    kind = type(key)
    if kind in _ATOMS:
        return key
    if kind in (tuple, frozenset):
        for one in key:  # type: ignore[attr-defined]
            _key(one, place)
        return key
    raise ValueNotCarried(f"value {place}: a key or set element of type {_type_name(key)} cannot be carried by a checkpoint")


def carried(value: object, place: str) -> Value:
    """A copy that shares nothing with `value`; small tensors and numpy arrays become ArrayValues.

    Raises ValueNotCarried, with the place, for everything else: functions, modules, tensors over 64 KiB, subclasses of
    the plain types.
    """
    return mapped(value, place, carried_leaf)


def carried_leaf(value: object, place: str) -> Value:
    """`carried` for what is no container."""
    if type(value) in _ATOMS or type(value) is ArrayValue:
        return value
    if isinstance(value, torch.Tensor):
        return _of_tensor(value, place)
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return _of_numpy(numpy.asarray(value), place)
    hint = " from inside a value: put it at the top of `state`" if hasattr(value, "state_dict") else ""
    raise ValueNotCarried(
        f"value {place}: {_type_name(value)} cannot be carried by a checkpoint{hint}; expected None, bool, int, float, "
        f"complex, str, bytes, a list, tuple, set, dict, Counter, OrderedDict, tensor, or an object with state_dict "
        f"and load_state_dict"
    )


def _type_name(value: object) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} {getattr(value, '__qualname__', '')}".strip()


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
    return ArrayValue(_NAMES[tensor.dtype], tuple(tensor.shape), data, "torch")


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
    return ArrayValue(array.dtype.name, array.shape, little.tobytes(), "numpy")


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
    return torch.frombuffer(bytearray(value.data), dtype=_TORCH[value.dtype]).reshape(value.shape).to(device)


def _numpy_of(value: ArrayValue) -> object:
    dtype = getattr(ml_dtypes, value.dtype, None) or numpy.dtype(value.dtype)
    array = numpy.frombuffer(bytearray(value.data), dtype=dtype).reshape(value.shape)
    return array[()]  # a 0-d array comes back as a numpy scalar, which is what nearly all were


def revived_leaf(value: Value, device: torch.device | str = "cpu") -> object:
    """The torch or numpy object that an ArrayValue was; anything else as it is."""
    if type(value) is not ArrayValue:
        return value
    return tensor_of(value, device=device) if value.origin == "torch" else _numpy_of(value)


def revived(value: Value, *, device: torch.device | str = "cpu") -> object:
    """A copy of `value` with tensors (on `device`) and numpy arrays where ArrayValues stand."""
    return mapped(value, "", lambda one, place: revived_leaf(one, device))


def typed_key(value: Value) -> Hashable:
    """Equal for two values exactly when they have the same types and bits: 1 is not True, 0.0 is not -0.0, NaN is NaN.

    The filling order of dicts does not count, that of an OrderedDict does.
    """
    kind = type(value)
    if isinstance(value, float):
        return (kind, struct.pack("<d", value))
    if isinstance(value, complex):
        return (kind, struct.pack("<dd", value.real, value.imag))
    if kind in _DICTS:
        pairs = ((typed_key(key), typed_key(one)) for key, one in value.items())  # type: ignore[attr-defined]
        return (kind, frozenset(pairs) if kind is not OrderedDict else tuple(pairs))
    if kind in (list, tuple):
        return (kind, tuple(typed_key(one) for one in value))  # type: ignore[attr-defined]
    if kind in (set, frozenset):
        return (kind, frozenset(typed_key(one) for one in value))  # type: ignore[attr-defined]
    return (kind, value)


def holds_arrays(value: Value) -> bool:
    """Whether an ArrayReference stands anywhere in the tree."""
    if type(value) is ArrayReference:
        return True
    if isinstance(value, dict):
        return any(holds_arrays(one) for one in value.values())
    return isinstance(value, (list, tuple)) and any(holds_arrays(one) for one in value)
