"""Canonical JSON: one spelling for one value, and a reader that refuses what bounded memory or two readings could hide.

ASCII (other characters as `\\uXXXX`), separators `,` and `:`, members in the order given, floats as the shortest
decimal that reads back to the same binary64 and never without `.`, `e` or both, no NaN or Infinity. [UCF-42, UCF-43]
"""

from __future__ import annotations

import json
from typing import NoReturn

from elastickpt.errors import LimitExceeded, Malformed, ValueNotCarried
from elastickpt.format.version import MAX_NODES

_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))
_SORTING = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"), sort_keys=True)


def dump(value: object) -> str:
    """The canonical text of JSON-able values; members in their order."""
    return _ENCODER.encode(value)


def dump_sorted(value: object) -> str:
    """The same with members sorted by name: equal for equal mappings, whatever order they were filled in."""
    return _SORTING.encode(value)


def _nodes(text: str) -> int:
    """At least as many as there are values in the text, without reading it."""
    return text.count(",") + text.count("[") + text.count("{")


def is_within_bounds(text: str) -> bool:
    """Whether a text has no more values than readers take. [UCF-91]"""
    return _nodes(text) <= MAX_NODES


def dump_bounded(value: object, *, where: str) -> str:
    """The canonical text. Raises ValueNotCarried where it is more than readers take. [UCF-91]"""
    return bounded(dump(value), where=where)


def bounded(text: str, *, where: str) -> str:
    """A canonical text that was put together of others. Raises likewise."""
    if not is_within_bounds(text):
        raise ValueNotCarried(
            f"{where}: about {_nodes(text)} values, the limit is {MAX_NODES}; large data can be carried as tensors"
        )
    return text


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"member {twice!r} stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _is_canonical(text: str, value: object) -> bool:
    try:
        return dump(value) == text.removesuffix("\n")
    except ValueError:  # numbers beyond binary64
        return False


def parse(data: bytes | str, *, where: str) -> object:
    """The value of a JSON text. Raises Malformed for bad UTF-8 or JSON, duplicate members and NaN; LimitExceeded for
    depth and for more than 2^22 values, counted before anything is built. [UCF-43, UCF-91]
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        if not is_within_bounds(text):
            raise LimitExceeded(f"{where}: about {_nodes(text)} values in one JSON text, the limit is {MAX_NODES}")
        value: object = json.loads(text, parse_constant=_no_constant)
        if not _is_canonical(text, value):  # else a member that stands twice would be missing in what it is dumped as
            value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise LimitExceeded(f"{where}: JSON is nested too deeply") from None
    except ValueError as problem:
        raise Malformed(f"{where}: {problem}") from None
    return value
