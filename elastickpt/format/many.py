"""Many frozen values at once, from columns of their fields.

A frozen dataclass sets each field by a call of its own and then looks at the values, 1 to 3 µs in all; of ten thousand arrays
that are alike in all but their names nothing is learned by looking at each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import fields
from itertools import repeat
from typing import Any, TypeVar

from elastickpt.errors import fault

T = TypeVar("T")


def many(kind: type[T], count: int, **columns: Iterable[Any]) -> list[T]:
    """`count` values of a frozen dataclass with slots; each column has at least so many entries. Nothing looks at them: the
    caller has made one of each sort the usual way. Raises InternalError for columns that are not its fields, or too short."""
    if columns.keys() != {field.name for field in fields(kind)}:  # type: ignore[arg-type]
        raise fault(f"{kind.__name__} has other fields than {sorted(columns)}")
    made: list[T] = list(map(kind.__new__, repeat(kind, count)))
    for name, column in columns.items():
        deque(map(getattr(kind, name).__set__, made, column), maxlen=0)
        if made and not hasattr(made[-1], name):
            raise fault(f"{count} of {kind.__name__} were to be made, and fewer were told their {name}")
    return made
