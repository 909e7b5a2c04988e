"""Replicated values of all ranks as one: equal, or dicts that differ only in which tensors they name. What optimizers hold
beside arrays is equal, or told apart by name. No I/O.

    rank 0: {"layers.0.w": tensor, "step": 3}     rank 1: {"layers.1.w": tensor, "step": 3}
    merged: {"layers.0.w": ..., "step": 3, "layers.1.w": ...}

Two pipeline stages' dicts of tensors are of this kind. All else that differs is a conflict: nobody could say which holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from elastickpt.errors import ReplicaConflict
from elastickpt.format.encode_values import pointer_token, values_equal
from elastickpt.format.records import Field, OptimizerTable
from elastickpt.format.tables import Name, Row, rows_of
from elastickpt.format.values import ArrayReference, ArrayValue, Value
from elastickpt.saving.messages import TABLE_PREFIX


def merge_values(pointer: str, by_rank: Mapping[int, Value]) -> Value:
    """What all ranks' trees at `pointer` are together, in the order of the lowest rank's keys, then of the others'.

    Raises ReplicaConflict naming the place and two ranks.
    """
    ranks = list(by_rank)
    merged = by_rank[ranks[0]]
    for rank in ranks[1:]:
        merged = _merged(pointer, (ranks[0], merged), (rank, by_rank[rank]))
    return merged


def _merged(place: str, one: tuple[int, Value], other: tuple[int, Value]) -> Value:
    (first, mine), (second, theirs) = one, other
    if type(mine) is dict and type(theirs) is dict:
        found = dict(mine)
        for key, value in theirs.items():
            where = f"{place}/{pointer_token(key)}"
            if key in mine:
                found[key] = _merged(where, (first, mine[key]), (second, value))
            else:
                found[key] = _own_tensors(where, value, second, first)
        for key in mine.keys() - theirs.keys():
            _own_tensors(f"{place}/{pointer_token(key)}", mine[key], first, second)
        return found
    if values_equal(mine, theirs):
        return mine
    raise ReplicaConflict(
        f"value {place!r} of the state: ranks {first} and {second} hold different contents; "
        "make it an entry of its own and wrap that in ek.PerRank if each rank has its own"
    )


def _own_tensors(place: str, value: Value, has: int, lacks: int) -> Value:
    """The value, if it is nothing but tensors: those have names of their own, and any rank may lack them."""
    if not _only_tensors(value):
        raise ReplicaConflict(
            f"value {place!r} of the state: found on rank {has}, not on rank {lacks}; "
            "only tensors may be on some ranks and not on others"
        )
    return value


def _only_tensors(value: Value) -> bool:
    if type(value) is dict:
        return all(_only_tensors(one) for one in value.values())
    return type(value) is ArrayReference


def merge_trees(pointers: Sequence[str], by_rank: Mapping[int, Mapping[str, Value]]) -> dict[str, Value]:
    """The merged tree of each pointer; a rank need not have every one."""
    return {
        pointer: merge_values(pointer, {rank: trees[pointer] for rank, trees in by_rank.items() if pointer in trees})
        for pointer in pointers
    }


# -- what optimizers hold per parameter --------------------------------------------------------------------------------


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
