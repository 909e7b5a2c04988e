"""From placements to boxes."""

from __future__ import annotations

from collections.abc import Sequence

from elastickpt.format.box import Box


def physical_box(shape: Sequence[int], *, sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[str]) -> Box:
    """The box that the rank at `coordinate` holds: plain shards first, then strided ones, each as torch.chunk cuts."""
    start, stop = [0] * len(shape), list(shape)
    for prefix in ("S(", "_S("):
        for size, index, placement in zip(sizes, coordinate, placements, strict=True):
            if placement.startswith(prefix):
                axis = int(placement[len(prefix) : -1])
                step = -(-(stop[axis] - start[axis]) // size)
                low = min(start[axis] + index * step, stop[axis])
                start[axis], stop[axis] = low, min(low + step, stop[axis])
    return Box(tuple(start), tuple(stop))
