"""What a pickle may hold once it is read: plain Python values, and these inert stand-ins. None of them does anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from elastickpt.foreign.listing import Storage


class Instance:
    """An object of a class that is known by name only: the arguments it was made with, and its state.

    Equal to itself alone, so that it can be the key of a mapping before its state is known.
    """

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[object, ...] = (), state: object = None) -> None:
        self.name = name
        self.arguments = arguments
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def fields(self) -> dict[str, object]:
        """Its attributes, where the state is a mapping of names; else nothing."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return {name: one for name, one in state.items() if isinstance(name, str)} if isinstance(state, dict) else {}


@dataclass(frozen=True, slots=True)
class ElementType:
    """A torch dtype as a value: "float32", also one that no array can have ("qint8")."""

    name: str


@dataclass(frozen=True, slots=True)
class StorageClass:
    """A storage class of torch; `dtype` is None where the storage is untyped and counts bytes."""

    name: str
    dtype: str | None


@dataclass(frozen=True, slots=True)
class StorageReference:
    """A storage of the file, as a tensor refers to it."""

    kind: StorageClass
    storage: Storage


Make: TypeAlias = Callable[[tuple[object, ...]], object]


@dataclass(frozen=True, slots=True)
class Maker:
    """A class or function that a pickle may name, and what we make of a call of it."""

    name: str
    make: Make


def shown(value: object) -> str:
    """A value in a message: itself if it is small and plain, else what it is. Never a text as long as the value."""
    if isinstance(value, str | bytes):
        return f"{value[:40]!r}"
    if isinstance(value, list | tuple) and len(value) <= 8:
        return f"[{', '.join(f'{one[:40]!r}' if isinstance(one, str) else type(one).__name__ for one in value)}]"
    if value is None or isinstance(value, bool | int | float | Instance):
        return repr(value)
    return f"a {type(value).__name__}"
