"""`PerRank`: what differs between ranks by intent."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from elastickpt.format.values import Value


@runtime_checkable
class Reshardable(Protocol):
    """An object that knows how its per-rank state is cut for another number of ranks."""

    def reshard(self, states: list[Value], rank: int, world_size: int) -> object:
        """The state for `rank` of `world_size` ranks, from those of all ranks that saved, in their order.

        Called before anything is loaded, so it must not change the object: the result goes to `load_state_dict` later.
        """
        ...


class PerRank:
    """Marks an entry of `state` as this rank's own: `state = {"loader": ek.PerRank(loader)}`.

    `value` is an object with state_dict and load_state_dict, or a plain value or container. Each rank's goes into that
    rank's part of the checkpoint, and is not compared between ranks. Tensors inside are carried whole, up to 64 KiB
    each. On the same layout each rank gets its own back. On another, the object's own `reshard` (see `Reshardable`) is
    asked; without one loading is refused. A plain value that cannot be changed in place (a number) is replaced in
    `value`.
    """

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"
