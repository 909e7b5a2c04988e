"""Do two checkpoints hold the same state, bit for bit? Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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
    differences, nbytes = [f"{array} (in one of the two only)" for array in a.records.keys() ^ b.records.keys()], 0
    for array in a.records.keys() & b.records.keys():
        x, y = a.read(array), b.read(array)
        nbytes += x.nbytes
        if (x.shape, x.dtype, x.tobytes()) != (y.shape, y.dtype, y.tobytes()):
            differences.append(str(array))
    ours, theirs = dict(values_of(a)), dict(values_of(b))
    differences += [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    return Comparison(len(a.records), nbytes, len(ours), tuple(sorted(differences)))


def values_of(checkpoint: ek.Checkpoint) -> Iterator[tuple[str, object]]:
    """The step, every value that is no array, leaf by leaf, and of each parameter the options and scalars of its optimizer.

    Of per-rank values the first rank's: ranks come and go at a seam, and in this run all of them draw from equal streams.
    """
    yield "step", checkpoint.step
    yield from leaves("", checkpoint.values)
    yield from leaves("", checkpoint.per_rank(0))
    for table in checkpoint.tables:
        for column in table.fields:
            for (item, name), which in zip(table.parameters, column.which, strict=True):
                yield f"{table.item}/{column.key} of {item}/{name}", column.values[which] if which >= 0 else None


def leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from leaves(f"{name}/{key}".replace("//", "/"), value[key])
    else:
        yield name, value
