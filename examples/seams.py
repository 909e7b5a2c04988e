"""Do two checkpoints hold the same state, bit for bit? Read with `ek.open`, which needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import elastickpt as ek


@dataclass(frozen=True)
class Comparison:
    """What was compared, and the names of what differs: arrays (parameters and optimizer state), and other values."""

    arrays: int
    nbytes: int
    values: int
    differences: tuple[str, ...]


def compare(saved: Path, loaded: Path) -> Comparison:
    """Compare every array of two checkpoints bytewise, and every value beside the arrays for equality."""
    a, b = ek.open(saved), ek.open(loaded)
    ours, theirs = dict(arrays_of(a.arrays)), dict(arrays_of(b.arrays))
    differences = [f"{name}: in one of the two only" for name in sorted(ours.keys() ^ theirs.keys())]
    nbytes = 0
    for name in sorted(ours.keys() & theirs.keys()):
        x, y = np.asarray(ours[name][...]), np.asarray(theirs[name][...])
        nbytes += x.nbytes
        if (x.shape, x.dtype, x.tobytes()) != (y.shape, y.dtype, y.tobytes()):
            differences.append(f"{name}: {int((x != y).sum()) if x.shape == y.shape else 'all'} elements differ")
    return Comparison(len(ours), nbytes, 0, tuple(differences))


def arrays_of(group: zarr.Group) -> Iterator[tuple[str, zarr.Array[Any]]]:
    for path, member in group.members(max_depth=None):
        if isinstance(member, zarr.Array):
            yield path, member
