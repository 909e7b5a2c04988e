"""Who saves beside training: a call that returns once the state may change, and a wait until the checkpoint is there."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from .contestants import OURS
from .records import Durability, Finish
from .state import State


class BesideTraining(Protocol):
    """Saves of one rank that go on after the call; all ranks call them together."""

    name: str
    durability: Durability

    def begin(self, state: State, path: Path) -> Finish:
        """Save to `path`, which does not exist yet; on return the state may change. The result waits until it is saved."""

    def close(self) -> None:
        """Release what is kept between calls."""


class BesideElastickpt:
    """`ek.async_save` with its defaults, but for the placement."""

    durability: Durability = "power"

    def __init__(self, name: str) -> None:
        self.name = name

    def begin(self, state: State, path: Path) -> Finish:
        import elastickpt as ek

        handle = ek.async_save(state, path, placement=OURS[self.name])
        handle.wait_staged()
        return lambda: _ended(handle.result(300.0))

    def close(self) -> None:
        """Its savers end with the process."""


def _ended(result: object) -> None:
    """A wait gives nothing back."""


def make_beside(name: str) -> tuple[BesideTraining, ...]:
    """The ways in which the library of that contestant saves beside training. Imports it."""
    library, _, threads = name.partition(":")
    if library in OURS:
        return (BesideElastickpt(library),)
    if library == "dcp":
        from .peer_dcp_beside import BesideDcp

        return tuple(BesideDcp(executor, *([int(threads)] if threads else [])) for executor in ("thread", "process"))
    if library in ("tc", "tc+fsync"):  # it syncs nothing here: that is done by callbacks, which its writer process cannot have
        from .peer_tc import BesideTorchCheckpointing

        return (BesideTorchCheckpointing(*([int(threads)] if threads else [])),)
    raise LookupError(name)
