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
    """Marks an entry of `state` as this rank's own: each rank's is saved, and comes back to the rank that saved it.

    It is not compared between ranks. On another layout the object's own `reshard(states, rank, world_size)` is asked, see
    `Reshardable`; without one loading is refused, naming the entry.

    Args:
        value: An object with `state_dict` and `load_state_dict`, or a plain value or container. Tensors inside are carried
            whole. A plain value that cannot be changed in place (a number) is replaced in `value`.

    Examples:
        >>> position = ek.PerRank({"file": 3, "offset": 1200})
        >>> info = ek.save({"position": position}, "out/position")
        >>> position.value["offset"] = 0
        >>> report = ek.load({"position": position}, "out/position")
        >>> position.value
        {'file': 3, 'offset': 1200}
    """

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"
