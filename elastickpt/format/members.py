"""Strict reading of one object of a record: each member once, of its type, and none left over. [UCF-44]"""

from __future__ import annotations

from typing import TypeGuard

from elastickpt.errors import Malformed

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
    return tuple(text(one, where=f"{where}[{k}]") for k, one in enumerate(sequence(value, where=where)))


def integers(value: object, *, where: str) -> tuple[int, ...]:
    return tuple(integer(one, where=f"{where}[{k}]") for k, one in enumerate(sequence(value, where=where)))


def pair(value: object, *, where: str) -> tuple[object, object]:
    items = sequence(value, where=where)
    if len(items) != 2:
        raise Malformed(f"{where}: expected two elements, found {len(items)}")
    return items[0], items[1]


class Members:
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

    def members(self, name: str) -> Members:
        return Members(self.take(name), where=f"{self.where}/{name}")

    def close(self) -> None:
        if self._left:
            names = ", ".join(sorted(map(repr, self._left)))
            raise Malformed(f"{self.where}: unknown members {names}")
