"""From a job's structure to what its committer writes beside the writers' data. No I/O."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from elastickpt.commit.contents import Outline
from elastickpt.format.records import ArrayRecord
from elastickpt.format.release import RELEASE
from elastickpt.format.values import Value
from elastickpt.ranks.process_group import torch_version
from elastickpt.saving.merge import MergedStructure, SharedArray
from elastickpt.training.held import HeldArray

Attributes = tuple[tuple[str, Value], ...]
AXIS_ORDER = "axis_order"


def outline_of(merged: MergedStructure, *, world_size: int) -> Outline:
    """What every save of this structure has in common."""
    return Outline(
        world_size=world_size,
        placement="plain",
        versions=(("elastickpt", RELEASE), ("torch", torch_version()), ("python", platform.python_version())),
        items=merged.items,
        meshes=merged.meshes,
        layouts=merged.layouts,
        arrays=tuple(
            ArrayRecord(a.entry.spec, a.key, a.chunk_shape, a.layout, (), _attributes(a.entry.attributes, a.order))
            for a in sorted(merged.arrays.values(), key=lambda shared: shared.key)
        ),
        tied=merged.tied,
    )


def records_of(arrays: Sequence[HeldArray], shared: Sequence[SharedArray]) -> tuple[ArrayRecord, ...]:
    """The held arrays as the index will list them, as far as their documents need it (writers and layout are not in those)."""
    return tuple(
        ArrayRecord(held.spec, fact.key, fact.chunk_shape, None, (), _attributes(held.attributes, fact.order))
        for held, fact in zip(arrays, shared, strict=True)
    )


def _attributes(own: Attributes, order: Sequence[int]) -> Attributes:
    """An array's attributes in the index: its own, and the order of its axes in memory if it is another than their own.
    [UCF-107]"""
    return (*own, (AXIS_ORDER, list(order))) if order else own
