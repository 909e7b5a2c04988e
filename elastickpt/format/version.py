"""What version 1 is: who writes it, the bounds of all that it has, and what a reader of it does not know: features, as a
manifest names them in `requires`. [UCF-73, UCF-90..98, UCF-100]

Bounds are checked by every reader before it allocates; a checkpoint beyond one is refused, not tried. A feature is a set of
tags of values, of attributes of arrays, of fields of tables or of places of values; a checkpoint requires it if and only if it
uses one.
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

MIB = 1 << 20

MAX_MANIFEST_NBYTES = 64 * MIB  # checkpoint.json, each index part, the root zarr.json
MAX_DOCUMENT_NBYTES = MIB  # every other zarr.json
MAX_FRAGMENTS_NBYTES = 1024 * MIB  # one writer's fragment file: 10^6 pieces and their checksums fit
MAX_DEPTH = 16  # nesting of a typed JSON value
MAX_NAME_NBYTES = 1024  # UTF-8 of an item, a name or a state
MAX_NDIM = 32
MAX_DIM = 1 << 48
MAX_CHUNK_NBYTES = 1024 * MIB
MAX_CHUNKS = 1 << 24  # of one array
MAX_ARRAYS = 1 << 21
MAX_WRITERS = 1 << 20
MAX_SMALL_ARRAY_NBYTES = 64 << 10  # of an array inside a typed JSON value
CONSOLIDATED_ARRAYS = 20_000  # the root has consolidated metadata up to this many arrays
MAX_NODES = 1 << 22  # members and elements of all containers of one JSON text or msgpack record together
MAX_EXPANDED = 1 << 23  # ranks that the runs of one record stand for, all runs together
MAX_INT_DIGITS = 4096  # of an integer inside a typed JSON value
MAX_PATH_NBYTES = 4096  # of a relative path in a record
MAX_COMPONENT_NBYTES = 255  # of one component of such a path
MIN_BLOCK_NBYTES = 64 << 10  # of a checksum block
MIN_PACK_BLOCK_NBYTES = 16 << 10  # of one in a pack
MAX_BLOCK_NBYTES = MIB
MAX_FILE_NBYTES = 1 << 62  # of any file, offset or length in a record: sums of three stay in 64 bits


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
