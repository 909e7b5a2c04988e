"""Bounds on what a pickle built, checked without recursion: keys before they are hashed, the whole once it stands. [FOR-14]"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from elastickpt.errors import LimitExceeded, Malformed
from elastickpt.foreign.pickle_values import ElementType, Instance

MAX_NESTING = 100
FREE_UNFOLDED = 1 << 20  # values that a walk which knows nothing of sharing may meet, and two for each byte of the pickle
_MAX_KEY_VALUES = 256
_PLAIN_KEYS = (str, int, float, bool, bytes, complex, type(None), Instance, ElementType)


def check_key(key: object, *, where: str) -> None:
    """Raises Malformed for what cannot be a key, LimitExceeded for tuples too deep or large to be hashed."""
    if type(key) in _PLAIN_KEYS:
        return
    level: list[object] = [key]
    seen = 0
    for _ in range(8):
        seen += len(level)
        if seen > _MAX_KEY_VALUES:
            raise LimitExceeded(f"{where}: a key of more than {_MAX_KEY_VALUES} values")
        found: list[object] = []
        for one in level:
            if type(one) in (tuple, frozenset) and isinstance(one, tuple | frozenset):
                found.extend(one)
            elif type(one) not in _PLAIN_KEYS:
                raise Malformed(f"{where}: a {type(one).__name__} is the key of a mapping or in a set")
            if len(found) > _MAX_KEY_VALUES:
                raise LimitExceeded(f"{where}: a key of more than {_MAX_KEY_VALUES} values")
        if not found:
            return
        level = found
    raise LimitExceeded(f"{where}: a key nested more than 8 deep")


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, Instance):
        return (*value.arguments, value.state)
    return ()


_CONTAINERS = frozenset((dict, OrderedDict, Counter, list, tuple, set, frozenset, Instance))  # all that a pickle can make


def check_tree(root: object, *, nbytes: int, where: str) -> None:
    """Raises LimitExceeded where a value lies in itself, is nested too deeply, or unfolds to more than a pickle of
    `nbytes` bytes may.

    Each container is looked at once, however often it is shared.
    """
    done: dict[int, tuple[int, int]] = {}  # id -> (values it unfolds to, nesting)
    open_now: set[int] = set()
    work: list[tuple[object, bool]] = [(root, False)]
    while work:
        value, entered = work.pop()
        key = id(value)
        if entered:
            open_now.discard(key)
            done[key] = _measured(value, done, where, FREE_UNFOLDED + 2 * nbytes)
        elif key in open_now:
            raise LimitExceeded(f"{where}: a {type(value).__name__} that contains itself")
        elif key not in done and type(value) in _CONTAINERS:
            open_now.add(key)
            work.append((value, True))
            work.extend((one, False) for one in _inside(value) if type(one) in _CONTAINERS and id(one) not in done)


def _measured(value: object, done: dict[int, tuple[int, int]], where: str, limit: int) -> tuple[int, int]:
    count, depth = 1, 0
    for one in _inside(value):
        if type(one) in _CONTAINERS:
            inner_count, inner_depth = done[id(one)]
            count += inner_count
            depth = max(depth, inner_depth)
        else:
            count += 1
    if count > limit:
        raise LimitExceeded(f"{where}: shared values unfold to more than {limit}")
    if depth >= MAX_NESTING:
        raise LimitExceeded(f"{where}: nested more than {MAX_NESTING} deep")
    return count, depth + 1
