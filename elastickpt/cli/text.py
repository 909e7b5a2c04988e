"""How single things are spelled for people: names, sizes, shapes, sets of numbers, values."""

from __future__ import annotations

import unicodedata
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import TypeVar

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

_T = TypeVar("_T")

SHOWN_CHARACTERS = 200  # of a string inside a value
SHOWN_ELEMENTS = 16  # of a container or small array inside a value


def printable(text: str) -> str:
    """The text with control, format and other invisible characters escaped: names come from whoever wrote them. [CLI-5]"""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(ord(char)) for char in text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def columns_of(text: str) -> int:
    """Terminal columns that the text fills."""
    return len(text) if text.isascii() else _columns_of(text)


@lru_cache(maxsize=4096)  # shapes and guides come again and again
def _columns_of(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def plural(count: int, noun: str) -> str:
    """(1, "array") -> "1 array"; (2000, "array") -> "2,000 arrays"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def nbytes_text(nbytes: float) -> str:
    """11008 -> "10.8 KiB"."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        nbytes /= 1024
        if nbytes < 999.95:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:,.1f} PiB"


def shape_text(shape: Sequence[int]) -> str:
    """(10, 14) -> "10×14"; () -> "scalar"."""
    return "×".join(map(str, shape)) if shape else "scalar"


def ranges_text(numbers: Iterable[int], *, to: str = "-") -> str:
    """(0, 1, 2, 5) -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}{to}{high}" for low, high in runs)


def time_text(seconds: float) -> str:
    """Seconds since 1970 -> "2026-07-27 10:27:02 UTC"; beyond what a calendar has, the number itself."""
    try:
        return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s after 1970"


def age_text(seconds: float) -> str:
    """5400 -> "1.5 h"; a time to come is 0."""
    seconds = max(seconds, 0.0)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    for unit, length, end in (("min", 60, 99.5), ("h", 3600, 47.95)):
        if seconds / length < end:
            return f"{seconds / length:.0f} {unit}" if unit == "min" else f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86400:,.1f} d"


def value_text(value: Value) -> str:
    """One line, as Python writes it; long text, containers and arrays are cut short."""
    if isinstance(value, str):
        cut = "" if len(value) <= SHOWN_CHARACTERS else f"… ({len(value):,} characters)"
        return printable(repr(value[:SHOWN_CHARACTERS])) + cut
    if isinstance(value, bytes):
        return f"bytes[{len(value)}]"
    if isinstance(value, ArrayValue):
        return _array_text(value)
    if isinstance(value, ArrayReference):
        return "→ " + printable("/".join(part for part in ("extra", value.item, value.name) if part))
    if isinstance(value, StateReference):
        return "→ " + printable(value.name)
    if isinstance(value, DtypeValue | DeviceValue):
        return printable(value.name)
    if isinstance(value, EnumValue):
        return printable(f"{value.type}.{value.name}")
    if isinstance(value, NamedTupleValue):
        fields = zip(value.fields, value.values, strict=True)
        parts = [f"{printable(name)}={value_text(one)}" for name, one in _first(fields)]
        return printable(value.type.rpartition(".")[2]) + _listed(parts, len(value.fields), "()")
    if isinstance(value, Mapping):
        return _listed([f"{value_text(key)}: {value_text(one)}" for key, one in _first(value.items())], len(value), "{}")
    if isinstance(value, tuple):
        tail = "," if len(value) == 1 else ""
        return _listed([value_text(one) for one in _first(value)], len(value), "()", tail)
    if isinstance(value, list | set | frozenset | deque):
        brackets = "[]" if isinstance(value, list | deque) else "{}"
        return _listed([value_text(one) for one in _first(value)], len(value), brackets)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1000:
        return f"an integer of {value.bit_length():,} bits"
    return repr(value)


def _first(values: Iterable[_T]) -> list[_T]:
    return [one for _, one in zip(range(SHOWN_ELEMENTS), values, strict=False)]


def _listed(parts: list[str], count: int, brackets: str, tail: str = "") -> str:
    more = f", … {count - len(parts):,} more" if count > len(parts) else tail
    return f"{brackets[0]}{', '.join(parts)}{more}{brackets[1]}"


def _array_text(value: ArrayValue) -> str:
    import numpy as np

    try:
        dtype = np.dtype(value.dtype)
    except TypeError:
        import ml_dtypes

        dtype = np.dtype(getattr(ml_dtypes, value.dtype))
    elements = np.frombuffer(value.data, dtype=dtype.newbyteorder("<"))
    if not value.shape:
        return str(elements[0])
    known = f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return known if len(elements) > SHOWN_ELEMENTS else f"{known} {_listed([str(e) for e in elements], len(elements), '[]')}"
