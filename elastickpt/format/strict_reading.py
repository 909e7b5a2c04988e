"""Strict reading of records: each member once, of its type, and none left over; and integers in columns. [UCF-44]

A column is little-endian 64-bit integers in one `bin` of a msgpack record. [UCF-45, UCF-46]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import msgpack
import numpy as np
import numpy.typing as npt

from elastickpt.errors import LimitExceeded, Malformed
from elastickpt.format.version import MAX_EXPANDED, MAX_NODES, MAX_WRITERS

MAX_INT = 2**63 - 1


def is_int(value: object) -> TypeGuard[int]:
    """True for an integer that is no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def text(value: object, *, where: str) -> str:
    """The value if it is valid Unicode text. Raises Malformed otherwise; so do the functions below for their type."""
    if not isinstance(value, str):
        raise Malformed(f"{where}: expected text, found {_shown(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Malformed(f"{where}: lone surrogate in {_shown(value)}") from None
    return value


def integer(value: object, *, where: str, low: int = 0, high: int = MAX_INT) -> int:
    if not is_int(value) or not low <= value <= high:
        raise Malformed(f"{where}: expected an integer in [{low}, {high}], found {_shown(value)}")
    return value


def sequence(value: object, *, where: str) -> list[object]:
    if not isinstance(value, list):
        raise Malformed(f"{where}: expected a list, found {_shown(value)}")
    return value


def texts(value: object, *, where: str) -> tuple[str, ...]:
    if isinstance(value, list) and set(map(type, value)) <= {str} and all(map(str.isascii, value)):  # nearly all are
        return tuple(value)
    return tuple(text(one, where=f"{where}[{k}]") for k, one in enumerate(sequence(value, where=where)))


def integers(value: object, *, where: str) -> tuple[int, ...]:
    return tuple(integer(one, where=f"{where}[{k}]") for k, one in enumerate(sequence(value, where=where)))


def pair(value: object, *, where: str) -> tuple[object, object]:
    items = sequence(value, where=where)
    if len(items) != 2:
        raise Malformed(f"{where}: expected two elements, found {len(items)}")
    return items[0], items[1]


class StrictObject:
    """The members of one object, each taken once. `close` raises Malformed for those that nobody took."""

    __slots__ = ("_left", "where")

    def __init__(self, value: object, *, where: str) -> None:
        if not isinstance(value, dict):
            raise Malformed(f"{where}: expected an object, found {_shown(value)}")
        self._left: dict[object, object] = dict(value)
        self.where = where

    def take(self, name: str) -> object:
        try:
            return self._left.pop(name)
        except KeyError:
            raise Malformed(f"{self.where}: member {name!r} is missing") from None

    def has(self, name: str) -> bool:
        """Whether nobody took it yet: for members that older writers left out."""
        return name in self._left

    def text(self, name: str) -> str:
        return text(self.take(name), where=f"{self.where}/{name}")

    def integer(self, name: str, *, low: int = 0, high: int = MAX_INT) -> int:
        return integer(self.take(name), where=f"{self.where}/{name}", low=low, high=high)

    def sequence(self, name: str) -> list[object]:
        return sequence(self.take(name), where=f"{self.where}/{name}")

    def texts(self, name: str) -> tuple[str, ...]:
        return texts(self.take(name), where=f"{self.where}/{name}")

    def binary(self, name: str) -> bytes:
        value = self.take(name)
        if not isinstance(value, bytes):
            raise Malformed(f"{self.where}/{name}: expected bytes, found {_shown(value)}")
        return value

    def members(self, name: str) -> StrictObject:
        return StrictObject(self.take(name), where=f"{self.where}/{name}")

    def close(self) -> None:
        if self._left:
            names = ", ".join(sorted(map(repr, self._left)))
            raise Malformed(f"{self.where}: unknown members {names}")


IntColumn = npt.NDArray[np.int64]
UintColumn = npt.NDArray[np.uint64]


def pack(record: dict[str, object]) -> bytes:
    """The msgpack bytes of a record: members in their order, text as `str`, columns as `bin`."""
    return pack_map(len(record), pack_members(record))


def pack_members(record: dict[str, object]) -> bytes:
    """Some members of a record, in their order."""
    return b"".join(msgpack.packb(one, use_bin_type=True, strict_types=True) for pair in record.items() for one in pair)


def pack_map(count: int, members: bytes) -> bytes:
    """A record of so many members."""
    return bytes(msgpack.Packer().pack_map_header(count)) + members


class _Budget:
    """Counts what is built while it is built, so that one byte of input never becomes unbounded memory. [UCF-91]"""

    def __init__(self, where: str) -> None:
        self.left = MAX_NODES
        self.where = where

    def spend(self, count: int) -> None:
        self.left -= count + 1
        if self.left < 0:
            raise LimitExceeded(f"{self.where}: more than {MAX_NODES} values outside of columns")

    def sequence(self, items: list[object]) -> list[object]:
        self.spend(len(items))
        return items

    def mapping(self, pairs: Iterable[tuple[object, object]]) -> dict[object, object]:
        listed = list(pairs)
        self.spend(len(listed))
        found = dict(listed)
        if len(found) != len(listed):
            raise Malformed(f"{self.where}: a member stands twice in one map")
        return found


def _no_extension(code: int, data: bytes) -> object:
    raise Malformed(f"msgpack extension type {code} in a record")


def unpack(data: bytes, *, path: str) -> StrictObject:
    """The members of a record that is one msgpack map. Raises Malformed, or LimitExceeded for depth and counts."""
    budget = _Budget(path)
    try:
        record = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_no_extension,
            list_hook=budget.sequence,
            object_pairs_hook=budget.mapping,
            max_array_len=MAX_NODES,
            max_map_len=MAX_NODES,
        )
    except msgpack.StackError:
        raise LimitExceeded(f"{path}: msgpack is nested too deeply") from None
    except (ValueError, msgpack.UnpackException) as problem:
        raise Malformed(f"{path}: {type(problem).__name__}: {problem}") from None
    return StrictObject(record, where=path)


def pack_ints(values: npt.ArrayLike) -> bytes:
    """A column of integers in [-2^63, 2^63)."""
    return np.ascontiguousarray(values, dtype="<i8").tobytes()


def _column(members: StrictObject, name: str, *, dtype: str, length: int | None) -> npt.NDArray[np.generic]:
    data = members.binary(name)
    if len(data) % 8 or (length is not None and len(data) != 8 * length):
        expected = "a multiple of 8" if length is None else f"{8 * length}"
        raise Malformed(f"{members.where}/{name}: a column of {len(data)} bytes, expected {expected}")
    return np.frombuffer(data, dtype=dtype)


def take_ints(
    members: StrictObject, name: str, *, length: int | None = None, low: int = 0, high: int | None = None
) -> IntColumn:
    """A read-only column with every entry in [low, high] (`high` None: below 2^63). Raises Malformed otherwise."""
    column = _column(members, name, dtype="<i8", length=length).astype(np.int64, copy=False)
    if column.size and (int(column.min()) < low or (high is not None and int(column.max()) > high)):
        raise Malformed(
            f"{members.where}/{name}: entries from {column.min()} to {column.max()}, "
            f"expected [{low}, {'2^63' if high is None else high}]"
        )
    return column


def take_uints(members: StrictObject, name: str, *, length: int) -> UintColumn:
    """A read-only column of `length` unsigned integers."""
    return _column(members, name, dtype="<u8", length=length).astype(np.uint64, copy=False)


def pack_runs(ranks: Iterable[int]) -> list[list[int]]:
    """Integers in order as inclusive runs of consecutive ones: (0, 1, 2, 5) -> [[0, 2], [5, 5]]. [UCF-47]"""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return runs


class RankRuns:
    """Expands the runs of ranks in one record: each below 2^20, all together at most 2^23. [UCF-47, UCF-91, UCF-96]"""

    def __init__(self) -> None:
        self._left = MAX_EXPANDED

    def expand(self, value: object, *, where: str) -> tuple[int, ...]:
        found: list[int] = []
        for k, run in enumerate(sequence(value, where=where)):
            place = f"{where}[{k}]"
            first, last = pair(run, where=place)
            low = integer(first, where=place)
            high = integer(last, where=place, low=low)
            if high >= MAX_WRITERS:
                raise LimitExceeded(f"{place}: rank {high}, the limit is {MAX_WRITERS}")
            self._left -= high - low + 1
            if self._left < 0:
                raise LimitExceeded(f"{place}: the runs stand for more than {MAX_EXPANDED} integers")
            if found and found[-1] + 1 == low:
                raise Malformed(f"{place}: continues the run before it")
            found.extend(range(low, high + 1))
        return tuple(found)
