"""Arrays as words of their element size, flat, in C order: bits. Numbers are made of them only where a program asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickpt.errors import Unsupported
from elastickpt.format.arrays import dtype_named
from elastickpt.language.held import Strides

Words = NDArray[Any]
_WORDS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "<c16"}
_STEP = 1 << 20  # elements that are computed with at once: numbers of other sizes need little memory beside an array


def word_type(dtype: str) -> np.dtype[Any]:
    return np.dtype(_WORDS[dtype_named(dtype).itemsize])


def lattice(words: NDArray[Any], extents: tuple[int, ...], side: Strides) -> NDArray[Any]:
    """A view of flat words: element (k1, k2, ...) is at `side`. Raises AssertionError where it would leave them."""
    last = side.offset + sum((n - 1) * s for n, s in zip(extents, side.strides, strict=True))
    if 0 in extents:
        return np.empty(extents, words.dtype)
    if not 0 <= side.offset <= last < words.size:
        raise AssertionError(f"a lattice {extents} at {side} in {words.size} words")
    strides = tuple(stride * words.itemsize for stride in side.strides)
    return np.ndarray(extents, words.dtype, words.data, side.offset * words.itemsize, strides)


def number_type(dtype: str) -> np.dtype[Any]:
    """numpy's type of that name, or ml_dtypes'."""
    try:
        return np.dtype(dtype)
    except TypeError:
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype))
        return found


def numbers(words: Words, dtype: str) -> NDArray[Any]:
    return words.view(number_type(dtype))


def as_words(values: NDArray[Any], dtype: str) -> Words:
    """Numbers rounded to an element type, as its words."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.ascontiguousarray(values.astype(number_type(dtype)))
    return rounded.reshape(-1).view(word_type(dtype))


def number(word: Any, dtype: str) -> object:
    """One word as a number, for messages."""
    value: object = np.asarray(word).reshape(1).view(number_type(dtype))[0].item()
    return value


def cast_into(made: Words, dtype: str, words: Words, source: str) -> None:
    """Fills words of one element type from those of another, rounded as the types round. Raises Unsupported for bools."""
    if "bool" in (source, dtype) and source != dtype:
        raise Unsupported(f"a cast from {source} to {dtype}")
    for part in _parts(words.size):
        made[part] = as_words(numbers(words[part], source), dtype)


def scale(words: Words, dtype: str, divisor: Fraction) -> None:
    """What the whole has where this is stored divided: exact where the divisor is a power of two, else rounded once."""
    if divisor == 1:
        return
    for part in _parts(words.size):
        values = numbers(words[part], dtype).astype(np.float64) * divisor.numerator / divisor.denominator
        words[part] = as_words(values, dtype)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + _STEP) for start in range(0, count, _STEP))
