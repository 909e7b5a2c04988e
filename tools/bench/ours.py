"""elastickpt itself, with its defaults: power-durable saves, checksums verified on load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import elastickpt as ek

from .records import Durability
from .state import State


class Elastickpt:
    """`ek.save` and `ek.load`."""

    version = ek.__version__
    durability: Durability = "power"

    def __init__(self, placement: Literal["plain", "packed"]) -> None:
        self._placement: Literal["plain", "packed"] = placement
        self.name = "elastickpt" if placement == "plain" else "elastickpt-packed"
        self.settings = f"defaults, {placement} placement: durability='power', checksums written and verified"

    def save(self, state: State, path: Path) -> None:
        ek.save(state, path, placement=self._placement)

    def load(self, state: State, path: Path) -> None:
        ek.load(state, path)

    def close(self) -> None:
        """Nothing is kept."""
