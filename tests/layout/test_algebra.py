"""Box algebra against boolean masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import Malformed
from elastickpt.format.arrays import Box
from elastickpt.layout.algebra import contains, intersect, relative, shift, subtract

SIDE = 6
law = settings(max_examples=200, deadline=None)


@st.composite
def boxes(draw: st.DrawFn, ndim: int) -> Box:
    pairs = [sorted(draw(st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)))) for _ in range(ndim)]
    return Box(tuple(low for low, _ in pairs), tuple(high for _, high in pairs))


def two_boxes() -> st.SearchStrategy[tuple[Box, Box]]:
    return st.integers(0, 3).flatmap(lambda ndim: st.tuples(boxes(ndim), boxes(ndim)))


def mask(box: Box) -> np.ndarray:
    """shape=[SIDE, ...]: which elements are in the box."""
    found = np.zeros((SIDE,) * box.ndim, dtype=bool)
    found[tuple(map(slice, box.start, box.stop))] = True
    return found


@law
@given(two_boxes())
def test_intersect_is_the_common_elements_or_none(pair: tuple[Box, Box]) -> None:
    a, b = pair
    common = intersect(a, b)
    expected = mask(a) & mask(b)
    assert (common is None) == (not expected.any())
    if common is not None:
        assert np.array_equal(mask(common), expected)


@law
@given(two_boxes())
def test_subtract_is_the_other_elements_as_disjoint_boxes(pair: tuple[Box, Box]) -> None:
    a, b = pair
    rest = subtract(a, b)
    counts = sum((mask(box).astype(int) for box in rest), np.zeros((SIDE,) * a.ndim, dtype=int))
    assert np.array_equal(counts, (mask(a) & ~mask(b)).astype(int))
    assert len(rest) <= max(2 * a.ndim, 1)
    assert all(box.count for box in rest)


@law
@given(two_boxes())
def test_contains_is_about_elements(pair: tuple[Box, Box]) -> None:
    outer, inner = pair
    assert contains(outer, inner) == (not (mask(inner) & ~mask(outer)).any())


@law
@given(two_boxes())
def test_relative_and_shift_undo_each_other(pair: tuple[Box, Box]) -> None:
    inner = intersect(*pair)
    if inner is not None:
        moved = relative(inner, pair[0])
        assert moved.shape == inner.shape
        assert shift(moved, pair[0].start) == inner


def test_boxes_without_axes_have_one_element() -> None:
    point = Box((), ())
    assert intersect(point, point) == point
    assert subtract(point, point) == ()
    assert relative(point, point) == point


def test_what_does_not_fit_is_refused_by_name() -> None:
    line, plane = Box((0,), (4,)), Box((0, 0), (4, 4))
    for operation in (intersect, subtract, contains, relative):
        with pytest.raises(Malformed, match=r"have different numbers of axes: (1 and 2|2 and 1)"):
            operation(line, plane)
    with pytest.raises(Malformed, match=r"\[0:4\] is not inside box \[1:4\]"):
        relative(line, Box((1,), (4,)))
    with pytest.raises(Malformed, match="start <= stop"):
        shift(line, (-1,))
    with pytest.raises(Malformed, match="has 1 axes, the offset"):
        shift(line, (1, 1))
