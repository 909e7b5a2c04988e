"""Plain values that a checkpoint carries, and their typed JSON. What has no tag here is refused at save time.
[UCF-50..59, UCF-101..106]

A value is None, bool, int, float, complex, str, bytes, a list, a tuple, a set, a frozenset, a dict with hashable
keys, a Counter, an OrderedDict, a deque, a defaultdict with a factory of `FACTORIES`, or one of the dataclasses of
`value_types`; of exactly these types, since a subclass would come back as something else. JSON has no tuple, bytes,
integer keys, NaN or integers beyond 2^53: those are objects with one member whose name starts with `$`.
"""

from __future__ import annotations

from elastickpt.format.decode_values import decode_pointers, decode_text, decode_value
from elastickpt.format.encode_values import encode_pointers, encode_value, pointer_token, typed_key, value_digest, values_equal
from elastickpt.format.value_types import (
    FACTORIES,
    MAX_PLAIN_INT,
    ArrayReference,
    ArrayValue,
    DeviceValue,
    DtypeValue,
    EnumValue,
    NamedTupleValue,
    Origin,
    StateReference,
    Value,
)

__all__ = [
    "FACTORIES",
    "MAX_PLAIN_INT",
    "ArrayReference",
    "ArrayValue",
    "DeviceValue",
    "DtypeValue",
    "EnumValue",
    "NamedTupleValue",
    "Origin",
    "StateReference",
    "Value",
    "decode_pointers",
    "decode_text",
    "decode_value",
    "encode_pointers",
    "encode_value",
    "pointer_token",
    "typed_key",
    "value_digest",
    "values_equal",
]
