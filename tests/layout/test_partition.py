"""Splits and flat ranges against slices of a counted array."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import LayoutUnsupported, Malformed
from elastickpt.format.arrays import Box
from elastickpt.layout.placement import AxisSplit, balanced, even, explicit, flat_boxes, torch_chunk

law = settings(max_examples=200, deadline=None)
extents, ways = st.integers(0, 200), st.integers(1, 17)


def sizes(split: AxisSplit) -> list[int]:
    return [stop - start for start, stop in split]


def assert_adjacent(split: AxisSplit, extent: int, count: int) -> None:
    assert len(split) == count
    assert [start for start, _ in split] == [0, *(stop for _, stop in split[:-1])]
    assert split[-1][1] == extent


@law
@given(extents, ways)
@pytest.mark.parametrize("split", [torch_chunk, balanced])
def test_a_split_has_exactly_so_many_adjacent_intervals(split: Callable[[int, int], AxisSplit], extent: int, n: int) -> None:
    assert_adjacent(split(extent, n), extent, n)


@law
@given(extents, ways)
def test_balanced_sizes_differ_by_one_and_fall(extent: int, n: int) -> None:
    found = sizes(balanced(extent, n))
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] <= 1


def test_torch_chunk_is_what_torch_does() -> None:
    import torch

    for extent in (1, 2, 7, 10, 101, 1024, 50_257):
        for n in (1, 2, 3, 4, 7, 16):
            pieces = [len(piece) for piece in torch.arange(extent).chunk(n)]
            assert sizes(torch_chunk(extent, n)) == pieces + [0] * (n - len(pieces))


def test_what_is_empty_stands_at_the_end() -> None:
    assert torch_chunk(3, 5) == ((0, 1), (1, 2), (2, 3), (3, 3), (3, 3))
    assert balanced(2, 4) == ((0, 1), (1, 2), (2, 2), (2, 2))
    assert torch_chunk(0, 2) == balanced(0, 2) == even(0, 2) == ((0, 0), (0, 0))


@law
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9))
def test_explicit_sizes_are_kept(wanted: list[int]) -> None:
    split = explicit(sum(wanted), wanted)
    assert_adjacent(split, sum(wanted), len(wanted))
    assert sizes(split) == wanted


def test_even_and_explicit_refuse_what_does_not_add_up() -> None:
    assert even(12, 3) == ((0, 4), (4, 8), (8, 12))
    with pytest.raises(LayoutUnsupported, match="extent of 8 cannot be split evenly 3 ways: 2 left over"):
        even(8, 3)
    with pytest.raises(LayoutUnsupported, match=r"sizes \(4, 5\) add up to 9, the extent to split is 10"):
        explicit(10, (4, 5))
    with pytest.raises(LayoutUnsupported, match="add up to 10"):
        explicit(10, (12, -2))
    for split in (even, torch_chunk, balanced):
        with pytest.raises(LayoutUnsupported, match="cannot be split 0 ways"):
            split(4, 0)


def test_uneven_tensor_parallel_vectors() -> None:
    """V10: AutoTP gives the remainder to the first ranks, where `torch.chunk` leaves the last one short."""
    assert sizes(balanced(101, 2)) == [51, 50]
    assert sizes(balanced(10, 3)) == [4, 3, 3]
    assert sizes(balanced(10, 4)) == [3, 3, 2, 2]
    assert sizes(torch_chunk(10, 4)) == [3, 3, 3, 1]
    assert [heads * 64 for heads in sizes(balanced(6, 4))] == [128, 128, 64, 64]
    assert [heads * 3 for heads in sizes(balanced(4, 3))] == [6, 3, 3]
    by_heads = explicit(6 * 64, [128, 128, 64, 64])
    assert by_heads == ((0, 128), (128, 256), (256, 320), (320, 384))


@st.composite
def flat_ranges(draw: st.DrawFn) -> tuple[Box, int, int]:
    start = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    box = Box(start, tuple(low + draw(st.integers(0, 4)) for low in start))
    low, high = sorted(draw(st.tuples(st.integers(0, box.count), st.integers(0, box.count))))
    return box, low, high


@law
@given(flat_ranges())
def test_flat_boxes_are_the_range_in_order(case: tuple[Box, int, int]) -> None:
    box, low, high = case
    whole = np.arange(int(np.prod(box.stop, dtype=int))).reshape(box.stop)
    expected = whole[tuple(map(slice, box.start, box.stop))].ravel()[low:high]
    found = flat_boxes(box, low, high)
    pieces = [whole[tuple(map(slice, piece.start, piece.stop))].ravel() for piece in found]
    assert np.array_equal(np.concatenate([expected[:0], *pieces]), expected)
    assert len(found) <= max(2 * box.ndim - 1, 1)
    assert all(piece.count for piece in found)


def test_flat_boxes_of_the_documented_example() -> None:
    expected = (Box((0, 3), (1, 6)), Box((1, 0), (3, 6)), Box((3, 0), (4, 2)))
    assert flat_boxes(Box.whole((4, 6)), 3, 20) == expected


def test_flat_boxes_refuse_a_range_beyond_the_box() -> None:
    for low, high in ((-1, 3), (3, 2), (0, 25)):
        with pytest.raises(Malformed, match=r"of box \[0:4, 0:6\]: it has 24"):
            flat_boxes(Box.whole((4, 6)), low, high)
