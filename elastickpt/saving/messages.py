"""What ranks tell each other about a save, and what follows from all of it: the replicated values of all ranks as one. No I/O.

    rank 0: {"layers.0.w": tensor, "step": 3}     rank 1: {"layers.1.w": tensor, "step": 3}
    merged: {"layers.0.w": ..., "step": 3, "layers.1.w": ...}

Values are equal, or dicts that differ only in which tensors they name: two pipeline stages' dicts of tensors are of this kind.
All else that differs is a conflict: nobody could say which holds. What optimizers hold beside arrays is equal, or told apart by
name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from elastickpt.commit.attempt import Attempt
from elastickpt.errors import PlacementUnsupported, Refused, ReplicaConflict, StructureConflict
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_values import pointer_token, values_equal
from elastickpt.format.records import Field, FileDigest, OptimizerTable, Placement
from elastickpt.format.tables import TableName, TableRow, rows_of
from elastickpt.format.values import ArrayReference, ArrayValue, Value
from elastickpt.ranks.messages import Message, encode
from elastickpt.saving.merge import SharedArray


class Intention(Message, frozen=True):
    """What one rank is about to save: where, and digests of its structure and of each replicated value.

    `known` are structures of whole jobs for which this rank still has its plan. `staged` is the one by whose plan it has
    staged already, "" if it has not; `seated`: its writer knows where the others meet. `hashed` is the one by which it knew
    what to compare with other ranks, "" if it knew none, and `replicas` what it found, as `drift.Hashed.summary` has it.
    """

    target: tuple[str, str]  # store URL, name
    step: int | None
    options: tuple[str, ...]  # placement, durability, what is looked at of replicas
    table: str
    values: tuple[tuple[str, str], ...]  # JSON pointer, digest
    known: tuple[str, ...]
    staged: str = ""
    seated: bool = True
    hashed: str = ""
    replicas: tuple[tuple[int, int], ...] = ()


TypedValues = tuple[tuple[str, str], ...]  # by JSON pointer, as typed JSON text


class OpenedAttempt(Message, frozen=True):
    """What a member is told of the attempt that member 0 opened: the replicated values `wanted` of it, and whether any are
    wanted of others than member 0."""

    attempt: Attempt
    wanted: tuple[str, ...]
    gathers: bool


class Next(Message, frozen=True):
    """What member 0 says once it knows all intentions. `sends`: this member sends its table along; `differing` are pointers
    of values of which members hold different parts; `opened` is what it opened at once, None if there is more to ask.
    `compared`: replicas were, as all had hashed them by this structure, and differ in the looks `drifted`."""

    structure: str
    known_to_all: bool
    sends: bool
    differing: tuple[str, ...]
    seats: bool
    compared: bool
    drifted: tuple[int, ...]
    opened: OpenedAttempt | None


class Attested(Message, frozen=True):
    """What one rank wrote: its fragment file, and the replicated values asked of it as typed JSON text."""

    file: FileDigest
    values: TypedValues


def structure_id(ranks: Sequence[int], tables: Sequence[str], rule: str) -> str:
    """Identifies the structure of a whole job: which rank has which table, and by which rule its files are placed."""
    return file_digest(encode((tuple(ranks), tuple(tables), rule)))


def require_same_intention(intentions: Sequence[Intention], ranks: Sequence[int]) -> None:
    """Raises Refused if ranks mean different saves."""
    first = intentions[0]
    for rank, other in zip(ranks[1:], intentions[1:], strict=True):
        if first.options[0] != other.options[0]:
            raise PlacementUnsupported(
                f"placement of this save: expected the same on all ranks, "
                f"found {first.options[0]!r} on rank {ranks[0]} and {other.options[0]!r} on rank {rank}"
            )
        for what in ("target", "step", "options"):
            mine, theirs = getattr(first, what), getattr(other, what)
            if mine != theirs:
                raise Refused(
                    f"{what} of this save: expected the same on all ranks, "
                    f"found {mine} on rank {ranks[0]} and {theirs} on rank {rank}"
                )


def require_staged_alike(intentions: Sequence[Intention], ranks: Sequence[int], structure: str) -> None:
    """Raises StructureConflict if a rank staged by the plan of another structure of the job than the one that it has now."""
    stale = [rank for rank, one in zip(ranks, intentions, strict=True) if one.staged not in ("", structure)]
    if stale:
        changed = [rank for rank, one in zip(ranks, intentions, strict=True) if not one.staged]
        who = f"that of ranks {changed} changed" if changed else "ranks do not go by the same one"
        raise StructureConflict(
            f"structure of the job: {who}, after ranks {stale} had staged by the one that they knew; "
            "this save is given up, the next one goes by the new structure"
        )


def differing_values(intentions: Sequence[Intention]) -> tuple[str, ...]:
    """JSON pointers of values that two ranks hold differently, and so of optimizer tables."""
    seen: dict[str, str] = {}
    differing: dict[str, None] = {}
    for intention in intentions:
        for pointer, digest in intention.values:
            if seen.setdefault(pointer, digest) != digest:
                differing[pointer] = None
    return tuple(differing)


def values_wanted(intentions: Sequence[Intention]) -> tuple[tuple[str, ...], ...]:
    """By member: the replicated values that it sends along; each value is asked of the first member that has it."""
    taken: set[str] = set()
    wanted = []
    for intention in intentions:
        mine = tuple(
            pointer for pointer, _ in intention.values if pointer not in taken and not pointer.startswith(TABLE_PREFIX)
        )
        taken.update(mine)
        wanted.append(mine)
    return tuple(wanted)


TABLE_PREFIX = "optimizer tables of "  # not a JSON pointer: compared like a value, but carried in fragment files


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


def _rows(table: Any) -> dict[TableName, TableRow]:
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


# -- what the ranks of one table learn of its arrays --------------------------------------------------------------------


class SharedTable(Message, frozen=True):
    """What the ranks of one table learn of its arrays, in their order: a column for each member of `SharedArray`. `groups` and
    `peers` are numbers in `sets`. `compares`: some rank compares contents each time."""

    placement: Placement
    compares: bool
    sets: tuple[tuple[int, ...], ...]
    keys: tuple[str, ...]
    chunk_shapes: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    writes: tuple[bool, ...]
    peers: tuple[int, ...]
    documents: tuple[int, ...]
    heads_group: tuple[bool, ...]
    orders: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shared: Sequence[SharedArray], *, placement: Placement, compares: bool) -> SharedTable:
        found: dict[tuple[int, ...], int] = {}
        numbers: dict[int, int] = {}  # by the very set, as a comparison goes through all of its ranks

        def number(ranks: tuple[int, ...]) -> int:
            known = numbers.get(id(ranks))
            if known is None:
                known = numbers[id(ranks)] = found.setdefault(ranks, len(found))
            return known

        keys, shapes, groups, writes, peers, documents, heads, orders = zip(*shared, strict=True) if shared else ((),) * 8
        sets = tuple(map(number, groups)), tuple(map(number, peers))
        return cls(placement, compares, tuple(found), keys, shapes, sets[0], writes, sets[1], documents, heads, orders)

    def arrays(self) -> tuple[SharedArray, ...]:
        of_set = self.sets.__getitem__
        columns = (self.keys, self.chunk_shapes, map(of_set, self.groups), self.writes, map(of_set, self.peers))
        return tuple(map(SharedArray, *columns, self.documents, self.heads_group, self.orders))
