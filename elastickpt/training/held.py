"""Live state as fragments: what this rank holds of each array, and what it holds besides arrays.

Shapes and boxes are in elements and in global coordinates of the array; `tensor` is the local tensor, which has exactly the
shape of `box` (checked here), any strides, any device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.arrays import ArraySpec, Box, Mesh, Section
from elastickpt.format.records import Item, OptimizerTable
from elastickpt.format.values import Value

Sharing = Literal["placed", "declared", "undeclared"]
Kept = Literal["equal", "broadcast", "loose"]
Role = Literal["parameter", "buffer", "other"]


@dataclass(frozen=True, slots=True, eq=False)
class HeldArray:
    """This rank's part of one array: a held piece, whose offset and strides are those of `tensor`.

    `sharing` says who else holds the same elements:
    `placed`: decided by `mesh` and `placements` (a DTensor): ranks that differ only along replicated axes hold the same box.
    `declared`: all of `replicas` hold it (DDP's group, `fully_shard`'s mesh for a buffer, `mesh=`, or only this rank).
    `undeclared`: a plain tensor; ranks with the same array are replicas if their contents are equal, else it is refused.
    `kept` says what keeps a declared one `equal`: training itself. `broadcast`: a buffer under DDP, which gives the first
    one's to all in a forward. `loose`: nothing, as it is a buffer below `fully_shard`, or DDP has `broadcast_buffers=False`.
    `role`: parameters and their optimizer state are split by bytes over replicas; all else is written whole by the first.
    """

    spec: ArraySpec
    box: Box
    tensor: torch.Tensor
    role: Role
    sharing: Sharing
    mesh: Mesh | None = None
    placements: tuple[str, ...] = ()  # one an axis of `mesh`: "R", "S(0)", "_S(0)"
    replicas: tuple[int, ...] = ()
    attributes: tuple[tuple[str, Value], ...] = ()
    kept: Kept = "equal"
    order: tuple[int, ...] = ()  # its axes by falling stride, () for their own order or where any order says the same

    def __post_init__(self) -> None:
        if self.tensor.shape != self.box.shape:
            raise LayoutUnsupported(
                f"array {self.spec.id}: its box {self.box} has shape {self.box.shape}, "
                f"this rank's local tensor has shape {tuple(self.tensor.shape)}"
            )

    @property
    def held_alone(self) -> bool:
        """Whether no other rank is known to hold the same elements."""
        if self.sharing == "placed":
            axes = self.mesh.sizes if self.mesh is not None else ()
            return not any(size > 1 and placement == "R" for size, placement in zip(axes, self.placements, strict=True))
        return len(self.replicas) == 1


@dataclass(frozen=True, slots=True, eq=False)
class LiveState:
    """All that this rank contributes to a save.

    `values` are the same on all ranks that have them (compared by digest), keyed by JSON pointer ("/scheduler/last_epoch" is
    inside the tree stored under "/scheduler": one entry for each item or typed part). `per_rank` are this rank's own.
    `tied` lists groups of (item, FQN) that are one tensor in memory; only the first of a group is among `arrays`.
    """

    arrays: tuple[HeldArray, ...]
    items: tuple[Item, ...]
    tables: tuple[OptimizerTable, ...] = ()
    values: Mapping[str, Value] = field(default_factory=dict)
    per_rank: Mapping[str, Value] = field(default_factory=dict)
    tied: tuple[tuple[tuple[str, str], ...], ...] = ()

    @property
    def sections(self) -> frozenset[Section]:
        """Of the arrays."""
        return frozenset(held.spec.id.section for held in self.arrays)
