"""Who takes part. A contestant is made inside each rank, after the process group, and closed at the job's end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from .records import Durability, Entrant
from .state import State

OURS: Mapping[str, Literal["plain", "packed"]] = {"elastickpt": "plain", "elastickpt-packed": "packed"}  # by placement
LIBRARIES = ("elastickpt", "elastickpt-packed", "dcp", "tc", "tc+fsync")
USUAL = ("elastickpt", "elastickpt-packed", "dcp", "tc+fsync")  # tc itself is the same but for its saves, which sync nothing


class Contestant(Protocol):
    """Saves and loads the state of one rank; both block, and all ranks call them together."""

    name: str
    version: str
    settings: str
    durability: Durability

    def save(self, state: State, path: Path) -> None:
        """Write the state to `path`, which does not exist yet."""

    def load(self, state: State, path: Path) -> None:
        """Fill the state's tensors in place from `path`."""

    def close(self) -> None:
        """Release what the contestant keeps between calls."""


def make(name: str) -> Contestant:
    """The contestant of that name; `dcp:4` is dcp with four threads per rank. Imports its library."""
    library, _, threads = name.partition(":")
    if library in OURS:
        from .ours import Elastickpt

        return Elastickpt(OURS[library])
    if library == "dcp":
        from .peer_dcp import TorchDcp

        return TorchDcp(int(threads)) if threads else TorchDcp()
    from .peer_tc import TorchCheckpointing

    durability: Durability = "none" if library == "tc" else "power"
    if threads:
        return TorchCheckpointing(int(threads), durability=durability)
    return TorchCheckpointing(durability=durability)


def entrant(name: str) -> Entrant:
    """How the contestant takes part here, or why it does not. Imports its library."""
    try:
        contestant = make(name)
    except (ImportError, AttributeError) as problem:
        return Entrant(name, version="", settings="", durability="none", absent_because=str(problem))
    contestant.close()
    return Entrant(name, contestant.version, contestant.settings, contestant.durability)


def is_known(name: str) -> bool:
    """Whether `name` is a library's, perhaps with a number of threads."""
    library, colon, threads = name.partition(":")
    return library in LIBRARIES and (not colon or (threads.isdigit() and int(threads) > 0 and library not in OURS))
