"""What is known of an entry of an optimizer's state dict: that its memory is carried, or that it follows from states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from elastickpt.training.known_memory import KnownMemory, spans_of, tensors_in
from elastickpt.training.members import Member, states_of
from elastickpt.training.optimizer_parts import Part

Path = tuple[Any, ...]
_NOTHING = object()


class Known:
    """Tensors that are carried already."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._kept = tuple(tensors)  # alive, so that no id is used again
        self._ids = {id(tensor) for tensor in self._kept}
        self._memory = KnownMemory(self._kept)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether it is one of them, or shows their elements only."""
        return id(tensor) in self._ids or self._memory.covers(tensor)


class Computed:
    """Asks an optimizer whether an entry follows from the states of a parameter: it changes when they do.

    For what shares no memory with them. What the object keeps elsewhere has one memory in two state dicts.
    """

    def __init__(self, state_dict: Callable[[], object]) -> None:
        self._state_dict = state_dict
        self._again: object = _NOTHING
        self._found: dict[tuple[Path, object], bool] = {}

    def __call__(self, path: Path, key: object, state: object, entry: object, part: Part, member: Member) -> bool:
        """`path`, `key` and `state` are where the entry stands; one answer counts for all parameters."""
        if (path, state) not in self._found:
            self._found[path, state] = self._asked((*path, key, state), entry, part, member)
        return self._found[path, state]

    def _asked(self, where: Path, entry: object, part: Part, member: Member) -> bool:
        if self._again is _NOTHING:
            self._again = self._state_dict()
        before = _at(self._again, where)
        memories = [spans_of(one) for one in tensors_in(entry)]
        if memories and memories == [spans_of(one) for one in tensors_in(before)]:
            return False
        states, kept = states_of(part.optimizer), states_of(part.optimizer)[member.parameter]
        states[member.parameter] = {key: _other(value) for key, value in kept.items()}
        try:
            after = _at(self._state_dict(), where)
        except Exception:  # its own code, on states that make no sense: then nothing is known, and the entry is carried
            return False
        finally:
            states[member.parameter] = kept
        return not _alike(before, after)


def _at(tree: object, path: Path) -> object:
    for key in path:
        try:
            tree = tree[key]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return _NOTHING
    return tree


def _other(value: object) -> object:
    """Something of the same form with other contents."""
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            if value.dtype is torch.bool:
                return value.logical_not()
            return value + 1 if value.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16) else value ^ 0x55
    return value + 1 if type(value) in (int, float) else value  # type: ignore[operator]


def _alike(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.eq(one, other).all())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return type(one) is type(other) and (one is other or one == other)
