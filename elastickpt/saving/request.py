"""What a caller asks for beside the state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, SupportsIndex, cast, get_args

from elastickpt.errors import PlacementUnsupported, Refused
from elastickpt.format.digest import block_checksum
from elastickpt.format.values import as_integer, described
from elastickpt.ranks.team import require_limit
from elastickpt.storage.store import Durability

PlacementChoice = Literal["auto", "plain"]
Replicas = Literal["owner", "sample", "verify"]
SHARES = 16  # into so many what a sample looks at is divided


@dataclass(frozen=True, slots=True)
class Request:
    """Where to save, as the caller says it, and how."""

    path: str
    step: int | None
    placement: PlacementChoice = "auto"
    durability: Durability = "power"
    replicas: Replicas = "owner"
    wait_limit_s: float | None = None

    @property
    def compares_replicas(self) -> bool:
        """Whether contents of replicas are looked at."""
        return self.replicas != "owner"

    @property
    def share(self) -> int:
        """Which share of the replicas a sample looks at, in [0, SHARES): another one for another step or name, the same on all
        ranks, and not always the first ones in a job that is often restarted."""
        return block_checksum(f"{self.step} {self.path.rstrip('/').rpartition('/')[2]}".encode()) % SHARES

    def require_known(self) -> None:
        """Raises Refused kinds for what no caller that passes a type checker asks for, by name."""
        require_limit("wait_limit_s", self.wait_limit_s)
        if not self.path:
            raise Refused("path '': expected a folder to be made, found an empty text")
        if self.placement not in get_args(PlacementChoice):
            raise PlacementUnsupported(f"placement {self.placement!r}: expected 'auto' or 'plain'; 'packed' is not built yet")
        if self.durability not in get_args(Durability):
            raise Refused(f"durability {self.durability!r}: expected one of {', '.join(get_args(Durability))}")
        if self.replicas not in get_args(Replicas):
            raise Refused(f"replicas {self.replicas!r}: expected one of {', '.join(get_args(Replicas))}")
        if self.step is not None and (type(self.step) is not int or not 0 <= self.step < 1 << 63):
            raise Refused(f"step {described(self.step)}: expected None or the number of completed steps, an int from 0 on")


def step_of(step: SupportsIndex | None) -> int | None:
    """A step as callers have it, also numpy's integers and tensors of one; what is none is left for `require_known`."""
    return cast("int | None", as_integer(step))
