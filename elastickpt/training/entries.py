"""Entries of `state` run code of their own (state dicts, loading, hooks): whose it was that raised, and what had changed.

On saving and binding nothing has changed yet. While a Binding is installed entries change one after the other; what the
error then says is enough to know which of them hold the checkpoint's contents and which still hold their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from elastickpt.errors import CheckpointError, EntryFailed

Step = Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class Install:
    """What one entry does once the tensors are filled, in order; `name` says which entry it is."""

    name: str
    steps: tuple[Step, ...]


def entry_name(key: str, value: object) -> str:
    """An entry in a message: its key and its class."""
    return f"entry {key!r} ({type(value).__name__})"


def elements(value: object) -> Mapping[str, Any]:
    """The objects of an entry by path: "" for a single one, else by place in a list or key of a dict."""
    if type(value) is dict:
        return {str(key): one for key, one in value.items()}
    if type(value) in (list, tuple):
        return {str(index): one for index, one in enumerate(cast(Sequence[object], value))}
    return {"": value}


def type_name(value: object) -> str:
    """The class of an entry; of several objects their number and classes."""
    if type(value) not in (dict, list, tuple):
        return type(value).__name__
    each = elements(value).values()
    return f"{len(each)} x {', '.join(sorted({type(one).__name__ for one in each}))}"


@contextmanager
def code_of(entry: str, *, doing: str) -> Iterator[None]:
    """What the entry's code raises becomes EntryFailed, which names the entry; errors of this library stay as they are."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise EntryFailed(f"{entry}: {doing} raised {_told(error)}; nothing was changed") from error


def install_all(installs: Sequence[Install]) -> None:
    """Runs all steps. Raises EntryFailed, or the library's own error of a step, saying what had been changed by then."""
    for number, install in enumerate(installs):
        for step in install.steps:
            try:
                step()
            except Exception as error:
                changed = _listed([other.name for other in installs[:number]])
                before = f"changed already: all tensors that were read{changed}, and perhaps a part of this entry"
                after = _listed([other.name for other in installs[number + 1 :]]).removeprefix(", ")
                rest = f"; not reached: {after}" if after else ""
                if isinstance(error, CheckpointError):
                    raise type(error)(f"{error.message}; {before}{rest}", report=error.report) from error
                told = f"{install.name}: loading its state raised {_told(error)}; {before}{rest}"
                raise EntryFailed(told) from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _listed(names: Sequence[str]) -> str:
    return "".join(f", {name}" for name in names)
