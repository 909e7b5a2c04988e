"""Who writes, and what a reader of version 1 does not know: features, as a manifest names them in `requires`. [UCF-73, UCF-100]

A feature is a set of tags of values, of attributes of arrays, of fields of tables or of places of values; a checkpoint requires
it if and only if it uses one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping

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

RELEASE = "0.1.0"
CONVERTER = "ckpt-convert"  # in the versions of a manifest: a conversion made the checkpoint, no job [UCF-120]


PYTHON_TYPES = "python-types"  # $deque, $defaultdict, $namedtuple, $dtype, $device, $enum
ARRAYS_IN_VALUES = "arrays-in-values"  # $numpy, $state; the attribute `rank`
AXIS_ORDER = "axis-order"  # $strided
COMPOSITES = "composites"  # the attribute `composition`
OWN_ENTRIES = "own-entries"  # replicated values below a model
OPTIMIZER_PARTS = "optimizer-parts"  # fields `@part` and `<state>@in` of an optimizer's table
PACKS = "packs"  # packs named by attempt and writer

FEATURES = frozenset((PYTHON_TYPES, ARRAYS_IN_VALUES, AXIS_ORDER, COMPOSITES, OWN_ENTRIES, OPTIMIZER_PARTS, PACKS))

_OF_TYPE: Mapping[type, str] = {
    deque: PYTHON_TYPES,
    defaultdict: PYTHON_TYPES,
    NamedTupleValue: PYTHON_TYPES,
    DtypeValue: PYTHON_TYPES,
    DeviceValue: PYTHON_TYPES,
    EnumValue: PYTHON_TYPES,
    StateReference: ARRAYS_IN_VALUES,
}
_OF_TAG: Mapping[str, str] = {
    **dict.fromkeys(("$deque", "$defaultdict", "$namedtuple", "$dtype", "$device", "$enum"), PYTHON_TYPES),
    **dict.fromkeys(("$numpy", "$state"), ARRAYS_IN_VALUES),
    "$strided": AXIS_ORDER,
}
_OF_ATTRIBUTE: Mapping[str, str] = {"composition": COMPOSITES, "rank": ARRAYS_IN_VALUES}


def features_used(values: Iterable[Value], attributes: Iterable[str], fields: Iterable[str]) -> tuple[str, ...]:
    """The features that these values, names of arrays' attributes and keys of tables' fields need, sorted."""
    found = {OPTIMIZER_PARTS for key in fields if key.endswith(("@part", "@in"))}
    found |= {_OF_ATTRIBUTE[name] for name in attributes if name in _OF_ATTRIBUTE}
    for value in values:
        _collect(value, found)
    return tuple(sorted(found))


def features_in(text: str) -> set[str]:
    """The features that a typed JSON text needs: in one, no key of a user is spelled like a tag."""
    return {feature for tag, feature in _OF_TAG.items() if f'{{"{tag}":' in text}


def has_own_entries(models: Iterable[str], places: Iterable[str]) -> bool:
    """Whether one of these places of replicated values, JSON pointers, lies below one of these models' items. [UCF-141]"""
    below = tuple("/" + model.replace("~", "~0").replace("/", "~1") + "/" for model in models)
    return bool(below) and any(place.startswith(below) for place in places)


def _collect(value: Value, found: set[str]) -> None:
    kind = type(value)
    if kind in _OF_TYPE:
        found.add(_OF_TYPE[kind])
    if isinstance(value, ArrayValue):
        if value.order:
            found.add(AXIS_ORDER)
    elif isinstance(value, ArrayReference):
        if value.origin != "torch":
            found.add(ARRAYS_IN_VALUES)
    elif isinstance(value, NamedTupleValue):
        _collect(value.values, found)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if type(key) is not str:
                _collect(key, found)
            _collect(one, found)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        for one in value:
            _collect(one, found)
