"""What a composite tensor keeps beside its parts, its *context*, as a description: plain values, in which what has no plain
value stands as a mapping with a `kind`. Descriptions are compared; where they can, contexts are made from them. [UCF-110]
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from elastickpt.errors import ValueNotCarried
from elastickpt.format.values import DtypeValue, EnumValue, Value
from elastickpt.training.elements import torch_dtype
from elastickpt.training.trees import is_named_tuple, loaded_class, type_name

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def described(value: Any, outer: tuple[int, ...] | None, where: str) -> Value:
    """The description of a context; sequences equal to `outer` in it stand for the outer shape.

    Raises ValueNotCarried, beginning with `where`, for what has none.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (tuple, list, torch.Size):
        if outer is not None and tuple(value) == outer:
            return {"kind": "outer shape"}
        return {"kind": _SEQUENCES[kind], "of": [described(one, outer, f"{where}[{k}]") for k, one in enumerate(value)]}
    if kind in (dict, OrderedDict):
        pairs = [[described(key, None, where), described(one, outer, f"{where}[{key!r}]")] for key, one in value.items()]
        return {"kind": "dict", "pairs": pairs}
    if isinstance(value, torch.dtype):
        return DtypeValue(str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return {"kind": "device"}  # that of the parts, wherever they are
    if isinstance(value, (torch.layout, torch.memory_format)):
        return {"kind": "name", "of": str(value)}
    if isinstance(value, enum.Enum):
        return EnumValue(type_name(kind), value.name)
    if is_named_tuple(value):
        return _fields("named tuple", value, value._fields, outer, where)  # type: ignore[attr-defined]
    if is_dataclass(value) and not isinstance(value, type):
        return _fields("dataclass", value, [one.name for one in fields(value)], outer, where)
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    if callable(value) and "<" not in name and not name.startswith(".") and not name.endswith("."):
        return {"kind": "name", "of": name}
    raise ValueNotCarried(
        f"{where} holds a {type_name(kind)}, which a checkpoint cannot describe; expected plain values, element types, enums, "
        f"named tuples, dataclasses and named functions"
    )


_SEQUENCES: Mapping[type, str] = {tuple: "tuple", list: "list", torch.Size: "size"}


def _fields(kind: str, value: Any, names: Iterable[str], outer: tuple[int, ...] | None, where: str) -> Value:
    found = [[name, described(getattr(value, name), outer, f"{where}.{name}")] for name in names]
    return {"kind": kind, "class": type_name(type(value)), "fields": found}


class NotMade(Exception):
    """A composite tensor cannot be made here; the text says what was lacking."""


def context_from(description: Value, outer: tuple[int, ...], device: torch.device) -> Any:
    """The context that has this description. Raises NotMade for what only a live one has."""
    if isinstance(description, DtypeValue):
        return torch_dtype(description.name)
    if isinstance(description, EnumValue):
        raise NotMade(f"its context holds {description.type}.{description.name}")
    if not isinstance(description, dict):
        return description
    kind = description.get("kind")
    if kind == "outer shape":
        return outer
    if kind == "device":
        return device
    if kind in ("tuple", "list", "size"):
        elements = [context_from(one, outer, device) for one in description["of"]]
        return elements if kind == "list" else tuple(elements) if kind == "tuple" else torch.Size(elements)
    if kind == "dict":
        return {context_from(key, outer, device): context_from(one, outer, device) for key, one in description["pairs"]}
    if kind == "named tuple":
        cls = loaded_class(description["class"])
        if cls is not None and issubclass(cls, tuple) and getattr(cls, "_fields", None) is not None:
            return tuple.__new__(cls, [context_from(one, outer, device) for _, one in description["fields"]])
    raise NotMade(f"its context holds a {description.get('class', description.get('of', kind))}")


def description_text(value: Any) -> str:
    """For messages."""
    if isinstance(value, DtypeValue):
        return f"torch.{value.name}"
    if isinstance(value, dict) and "kind" in value:
        if value["kind"] in ("tuple", "list", "size"):
            return f"[{', '.join(map(description_text, value['of']))}]"
        if "fields" in value:
            inside = ", ".join(f"{name}={description_text(one)}" for name, one in value["fields"])
            return f"{value['class'].rpartition('.')[2]}({inside})"
        if "pairs" in value:
            return f"{{{', '.join(f'{description_text(key)}: {description_text(one)}' for key, one in value['pairs'])}}}"
        return str(value.get("of", value["kind"]))
    return repr(value)


def outer_shapes(description: Value) -> int:
    """How often the outer shape stands in a description."""
    if isinstance(description, dict):
        return 1 if description.get("kind") == "outer shape" else sum(map(outer_shapes, description.values()))
    return sum(map(outer_shapes, description)) if isinstance(description, list) else 0
