"""Compares two checkpoints, whatever their formats: names, shapes, types, values, settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elastickpt.convert.contents import Array, Contents
from elastickpt.convert.nodes import nbytes_of, resized
from elastickpt.convert.reading import Reading
from elastickpt.convert.words import numbers
from elastickpt.format.arrays import ArrayId
from elastickpt.format.encode_values import value_digest
from elastickpt.format.tables import TableName, TableRow

What = Literal["only in A", "only in B", "shape", "dtype", "values", "setting", "value"]
MAX_TOLD = 200  # characters of a value
# Entries of `args` that say how the ranks were arranged: another arrangement of the same checkpoint is no difference.
_OF_LAYOUT = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "data_parallel_size",
    "padded_vocab_size",
    "world_size",
    "rank",
}
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference. Of values: the greatest absolute and relative one, and the first index where bits differ."""

    name: str
    what: What
    a: str
    b: str
    max_abs: float | None = None
    max_rel: float | None = None
    index: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """`weights_only`: its format holds nothing else, so that nothing else is compared."""

    contents: Contents
    reading: Reading
    weights_only: bool = False


def compare(a: Side, b: Side, *, progress: Progress = lambda done, total: None) -> Iterator[Difference]:
    """All differences, as they are found; arrays of A first. Padding is not compared where both true sizes are known."""
    weights_only = a.weights_only or b.weights_only
    arrays = [
        {key: one for key, one in side.contents.arrays.items() if key.state == "value" or not weights_only} for side in (a, b)
    ]
    yield from _names(arrays[0], arrays[1])
    common = [identity for identity in arrays[0] if identity in arrays[1]]
    total = sum(nbytes_of(a.contents.arrays[one].node) for one in common)
    done = 0
    for identity in common:
        yield from _arrays(identity, a, b)
        done += nbytes_of(a.contents.arrays[identity].node)
        progress(done, total)
    if weights_only:
        return
    yield from _rows(a.contents.rows, b.contents.rows)
    yield from _values(a.contents.values, b.contents.values)


def _names(a: Mapping[ArrayId, Array], b: Mapping[ArrayId, Array]) -> Iterator[Difference]:
    for identity, one in a.items():
        if identity not in b:
            yield Difference(str(identity), "only in A", f"{one.node.dtype} {one.node.shape}", "")
    for identity, one in b.items():
        if identity not in a:
            yield Difference(str(identity), "only in B", "", f"{one.node.dtype} {one.node.shape}")


def _arrays(identity: ArrayId, a: Side, b: Side) -> Iterator[Difference]:
    one, other = a.contents.arrays[identity], b.contents.arrays[identity]
    shapes = [array.true or array.node.shape for array in (one, other)]
    if shapes[0] != shapes[1] and (one.true is None) != (other.true is None):  # one side knows nothing of padding
        shapes = [array.node.shape for array in (one, other)]
    if shapes[0] != shapes[1]:
        yield Difference(str(identity), "shape", str(shapes[0]), str(shapes[1]))
        return
    if one.node.dtype != other.node.dtype:
        yield Difference(str(identity), "dtype", one.node.dtype, other.node.dtype)
        return
    words = []
    for side, array in ((a, one), (b, other)):
        node = resized(array.node, shapes[0])
        side.reading.expect([node])
        words.append(side.reading.words(node))
    yield from _bits(str(identity), one.node.dtype, shapes[0], words)
    for side, some in zip((a, b), words, strict=True):
        side.reading.buffers.give_back(some)


def _bits(name: str, dtype: str, shape: tuple[int, ...], words: list[NDArray[Any]]) -> Iterator[Difference]:
    differ = words[0] != words[1]
    if not bool(differ.any()):
        return
    place = int(np.argmax(differ))
    index = tuple(int(k) for k in np.unravel_index(place, shape))
    kind = np.complex128 if dtype.startswith("complex") else np.float64
    first, second = (numbers(one, dtype).astype(kind) for one in words)
    with np.errstate(all="ignore"):
        gap = np.abs(first - second)
        relative = gap / np.maximum(np.abs(first), np.abs(second))
    most = [float(np.nanmax(one)) if not bool(np.isnan(one).all()) else float("nan") for one in (gap, relative)]
    yield Difference(name, "values", str(first[place]), str(second[place]), most[0], most[1], index)


def _rows(a: Mapping[str, Mapping[TableName, TableRow]], b: Mapping[str, Mapping[TableName, TableRow]]) -> Iterator[Difference]:
    for item in dict.fromkeys((*a, *b)):
        for name in dict.fromkeys((*a.get(item, {}), *b.get(item, {}))):
            one, other = a.get(item, {}).get(name, {}), b.get(item, {}).get(name, {})
            for key in dict.fromkeys((*one, *other)):
                if key not in one or key not in other or value_digest(one[key]) != value_digest(other[key]):
                    told = [repr(row[key]) if key in row else "absent" for row in (one, other)]
                    yield Difference(f"{item}: {key[1]} of {name[0]}/{name[1]}", "setting", told[0], told[1])


def _values(a: Mapping[str, object], b: Mapping[str, object]) -> Iterator[Difference]:
    for pointer in dict.fromkeys((*a, *b)):
        one, other = (_without_layout(side.get(pointer)) for side in (a, b))
        if pointer not in a or pointer not in b or value_digest(one) != value_digest(other):
            told = [repr(side[pointer])[:MAX_TOLD] if pointer in side else "absent" for side in (a, b)]
            yield Difference(pointer, "value", told[0], told[1])


def _without_layout(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {key: _without_layout(one) for key, one in value.items() if key not in _OF_LAYOUT}
