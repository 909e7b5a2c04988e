"""Do two checkpoints hold the same state, bit for bit? Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import elastickpt as ek


@dataclass(frozen=True)
class Comparison:
    """How much was compared, and what differs. `values` counts what is no array: options, scalars, the scheduler's, RNG."""

    arrays: int
    nbytes: int
    values: int
    differences: tuple[str, ...]


def compare(saved: Path, loaded: Path) -> Comparison:
    """Compare every array bytewise, and every other value for equality."""
    a, b = ek.open(saved), ek.open(loaded)
    ours, theirs = dict(arrays_of(a.arrays)), dict(arrays_of(b.arrays))
    differences = [f"array {name} in one of the two only" for name in sorted(ours.keys() ^ theirs.keys())]
    nbytes = 0
    for name in sorted(ours.keys() & theirs.keys()):
        x, y = np.asarray(ours[name][...]), np.asarray(theirs[name][...])
        nbytes += x.nbytes
        if (x.shape, x.dtype, x.tobytes()) != (y.shape, y.dtype, y.tobytes()):
            differences.append(f"array {name}")
    mine, other = dict(values_of(a)), dict(values_of(b))
    differences += [f"value {name}" for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name)]
    return Comparison(len(ours), nbytes, len(mine), tuple(differences))


def arrays_of(group: zarr.Group) -> Iterator[tuple[str, zarr.Array[Any]]]:
    for path, member in group.members(max_depth=None):
        if isinstance(member, zarr.Array):
            yield path, member


def values_of(checkpoint: Any) -> Iterator[tuple[str, object]]:
    """The step, the values that are no arrays, leaf by leaf, and each parameter's options and scalars of its optimizer.

    Of per-rank values the first rank's: ranks come and go at a seam, and all of them draw from one random stream here.
    """
    o = checkpoint.opened
    yield "step", o.manifest.step
    yield from leaves("", o.manifest.values)
    yield from leaves("", o.per_rank(0))
    for part in o.parts:
        for table in part.tables:
            for column in table.fields:
                for (item, name), which in zip(table.parameters, column.which, strict=True):
                    yield f"{table.item}/{item}/{name}/{column.key}", column.values[which] if which >= 0 else None


def leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from leaves(f"{name}/{key}", value[key])
    else:
        yield name, value
