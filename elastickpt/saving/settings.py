"""What ranks with the same parameters hold of optimizers beside arrays: it is to be equal, or is told apart by name. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from elastickpt.errors import ReplicaConflict
from elastickpt.format.records import Field, OptimizerTable
from elastickpt.format.tables import Name, Row, rows_of
from elastickpt.format.values import ArrayValue, Value, values_equal
from elastickpt.saving.messages import TABLE_PREFIX


def settings_of(table: OptimizerTable) -> Value:
    """A table as a value: its parameters, and its fields by kind and key."""
    fields = [(f.kind, f.key, list(f.values), list(f.which)) for f in table.fields]
    return (list(map(list, table.parameters)), fields)


_SETTING = {"hyper": "option", "scalar": "state", "schedule": "scheduler's entry"}


def require_same_tables(by_rank: Mapping[int, Mapping[str, Value]]) -> None:
    """Raises ReplicaConflict, naming optimizer, parameter, setting and both values, if ranks whose optimizer tables are to be
    equal have others."""
    first: dict[str, tuple[int, Any]] = {}
    for rank, trees in by_rank.items():
        for pointer, tables in trees.items():
            if not pointer.startswith(TABLE_PREFIX):
                continue
            known, mine = first.setdefault(pointer, (rank, tables))
            if mine is not tables and (found := _difference(mine, tables)) is not None:
                raise ReplicaConflict(_told(found, known, rank))


def _difference(one: Any, other: Any) -> tuple[str, ...] | None:
    """Optimizer, parameter, kind, key and both values, as text, of the first setting that differs."""
    for item in dict.fromkeys((*one, *other)):
        mine, theirs = (_rows(tables.get(item, ([], []))) for tables in (one, other))
        for parameter in dict.fromkeys((*mine, *theirs)):
            left, right = mine.get(parameter, {}), theirs.get(parameter, {})
            for kind, key in dict.fromkeys((*left, *right)):
                values = left.get((kind, key), _NONE), right.get((kind, key), _NONE)
                if _NONE in values or not values_equal(*values):
                    return (item, "/".join(parameter), kind, key, *("none" if v is _NONE else _shown(v) for v in values))
    return None


_NONE = object()


def _rows(table: Any) -> dict[Name, Row]:
    """What `settings_of` made of a table, by parameter."""
    parameters, fields = table
    columns = tuple(Field(kind, key, tuple(values), tuple(which)) for kind, key, values, which in fields)
    return rows_of(OptimizerTable("", tuple((item, name) for item, name in parameters), columns))


def _told(found: tuple[str, ...], first: int, second: int) -> str:
    item, parameter, kind, key, mine, theirs = found
    return (
        f"optimizer {item!r}: {_SETTING[kind]} {key!r} of parameter {parameter} is {mine} on rank {first} and {theirs} on rank "
        f"{second}, which hold the same parameters; expected one value: give all ranks the same settings, steps and schedules"
    )


def _shown(value: Value) -> str:
    if isinstance(value, ArrayValue):
        found = numpy.frombuffer(value.data, dtype=value.dtype) if hasattr(numpy, value.dtype) else None
        return f"a tensor of shape {value.shape}" if found is None or found.size != 1 else repr(found[0].item())
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
