"""Replicated values of all ranks as one: equal, or dicts that differ only in which tensors they name. No I/O.

    rank 0: {"layers.0.w": tensor, "step": 3}     rank 1: {"layers.1.w": tensor, "step": 3}
    merged: {"layers.0.w": ..., "step": 3, "layers.1.w": ...}

Two pipeline stages' dicts of tensors are of this kind. All else that differs is a conflict: nobody could say which holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elastickpt.errors import ReplicaConflict
from elastickpt.format.values import ArrayReference, Value, pointer_token, values_equal


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
