"""Numbers as programs hold them: Python's own, numpy's, tensors of one element and no dimension. Imports neither library."""

from __future__ import annotations

import operator
from decimal import Decimal
from numbers import Real


def as_integer(value: object) -> object:
    """The int that a value is by its own word (`__index__`: numpy's integers, tensors of one); any other value as it is, for
    whoever checks it. A bool is no number."""
    if type(value) is int or isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return value
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return value


def as_real(value: object) -> float | None:
    """The number that a scalar is; None for what is none: texts, bools, complex numbers, anything with a dimension, and a
    distributed tensor that no rank holds whole. Waits for the device of a tensor."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        if any(not one.is_replicate() for one in getattr(value, "placements", ())):
            return None
        value = getattr(value, "to_local", lambda: value)().item()
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def described(value: object) -> str:
    """What a value is, in few words: its shape if it has one."""
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    return f"{value!r:.80}" if shape is None else f"a {kind} of shape {tuple(shape)} and {getattr(value, 'dtype', 'no dtype')}"
