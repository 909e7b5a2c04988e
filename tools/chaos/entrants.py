"""Who takes part, and what is asked of a contestant. A new one is a few lines beside its library's, and a name here.

    def asynchronous(folder: Path) -> Contestant:                          # in ours.py
        def saving(state: State, path: Path) -> Finish:
            return ek.async_save(state, path).result
        return StepFolders(folder, saving, loading)

One with retention says in `keeps` how many of the newest acknowledged steps must load at any moment, and one that starts
processes has the role "helper". A contestant is made inside each rank, after the process group. All ranks call its methods
together.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from .contents import State

Finish = Callable[[], object]
Role = Literal["committer", "trainer", "helper"]  # rank 0, another rank, a process that a rank has started
ALL_STEPS = 1 << 30

OURS = ("elastickpt", "elastickpt-async", "elastickpt-large", "elastickpt-run", "elastickpt-packed", "elastickpt-packed-async")
POWER = (*OURS, "dcp", "tc+fsync")
KILLED = (
    *OURS,
    "dcp",
    "dcp-overwrite",
    "dcp-thread",
    "dcp-thread-overwrite",
    "dcp-process",
    "dcp-process-overwrite",
    "tc",
    "tc-async",
)
FLIPPED = ("elastickpt", "elastickpt-run", "elastickpt-packed", "dcp", "tc")


class Contestant(Protocol):
    """Saves and loads the state of one rank below the folder that it was made with."""

    def save(self, state: State, step: int) -> Finish:
        """Begin to save. When this returns the state may change; when what it returns does, the save is acknowledged."""

    def places(self) -> list[tuple[str, int | None]]:
        """What a user takes for checkpoints there, and the step that each is said to hold; None: it does not say."""

    def load(self, state: State, place: str) -> None:
        """Fill the state's tensors in place."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """How a contestant takes part. `keeps`: so many of the newest acknowledged steps must each load, whatever happens."""

    name: str
    version: str
    settings: str
    make: Callable[[Path], Contestant]
    keeps: int = ALL_STEPS
    roles: tuple[Role, ...] = ("committer", "trainer")


def is_known(name: str) -> bool:
    """Whether `name` is one of those here, or says where an entrant stands."""
    return name in POWER or name in KILLED or name in FLIPPED or ":" in name


def entrant(name: str) -> Entrant:
    """The entrant of that name, or, for `module:attribute`, the one that stands there. Imports its library.

    Raises ImportError where the library is not installed.
    """
    module, colon, attribute = name.partition(":")
    if colon:
        found = getattr(importlib.import_module(module), attribute)
    else:
        library = name.partition("-")[0].partition("+")[0]
        module = "ours" if library == "elastickpt" else f"peer_{library}"
        found = importlib.import_module(f"{__package__}.{module}").ENTRANTS[name]
    assert isinstance(found, Entrant)
    return found
