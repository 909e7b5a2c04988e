"""elastickpt itself, with its defaults: power-durable saves, checksums verified on load."""

from __future__ import annotations

from pathlib import Path

import elastickpt as ek

from .records import Durability
from .state import State


class Elastickpt:
    """`ek.save` and `ek.load`."""

    name = "elastickpt"
    version = ek.__version__
    settings = "defaults: durability='power', plain placement, checksums written and verified"
    durability: Durability = "power"

    def save(self, state: State, path: Path) -> None:
        ek.save(state, path)

    def load(self, state: State, path: Path) -> None:
        ek.load(state, path)

    def close(self) -> None:
        """Nothing is kept."""
