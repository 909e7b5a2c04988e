"""Shares of replicas: together the box, each element once, evenly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.arrays import Box
from elastickpt.format.version import MIB
from elastickpt.layout.algebra import prove_box_coverage
from elastickpt.layout.placement import MIN_SPLIT_NBYTES, share_of

law = settings(max_examples=200, deadline=None)


def shares(box: Box, *, itemsize: int, count: int, salt: int) -> list[tuple[Box, ...]]:
    return [share_of(box, itemsize=itemsize, index=k, count=count, salt=salt) for k in range(count)]


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    start = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    return Box(start, tuple(low + draw(st.integers(0, 40)) for low in start))


@law
@given(boxes(), st.sampled_from([1, 4, 64 << 10]), st.integers(1, 9), st.integers(0, 1 << 63))
def test_shares_cover_the_box_exactly_once(box: Box, itemsize: int, count: int, salt: int) -> None:
    found = shares(box, itemsize=itemsize, count=count, salt=salt)
    assert prove_box_coverage(box, [part for share in found for part in share]).exact
    if box.count * itemsize >= MIN_SPLIT_NBYTES:
        sizes = [sum(part.count for part in share) for share in found]
        longest = max((box.count // extent for extent in box.shape if extent >= count), default=1)
        assert max(sizes) - min(sizes) <= longest, "even to within one row"


def test_small_boxes_go_whole_to_one_replica_that_the_salt_chooses() -> None:
    box = Box((3, 0), (5, 100))
    assert [shares(box, itemsize=4, count=3, salt=salt).index((box,)) for salt in range(6)] == [0, 1, 2, 0, 1, 2]


def test_the_limit_is_one_mebibyte() -> None:
    under, at = Box.whole((MIB - 1,)), Box.whole((MIB,))
    assert shares(under, itemsize=1, count=2, salt=1) == [(), (under,)]
    assert shares(at, itemsize=1, count=2, salt=0) == [(Box((0,), (MIB // 2,)),), (Box((MIB // 2,), (MIB,)),)]


def test_rows_of_the_first_axis_that_has_enough_are_split() -> None:
    assert shares(Box((10, 0), (17, MIB)), itemsize=4, count=3, salt=0) == [
        (Box((10, 0), (13, MIB)),),
        (Box((13, 0), (15, MIB)),),
        (Box((15, 0), (17, MIB)),),
    ]
    assert shares(Box.whole((2, MIB)), itemsize=4, count=2, salt=0)[1] == (Box((1, 0), (2, MIB)),)
    assert shares(Box.whole((2, MIB)), itemsize=4, count=4, salt=0)[1] == (Box((0, MIB // 4), (2, MIB // 2)),)


def test_without_enough_rows_a_flat_range_is_split() -> None:
    """No axis of this box has 5 of anything; its elements are large."""
    found = shares(Box.whole((2, 4)), itemsize=MIB, count=5, salt=0)
    assert found[1] == (Box((0, 2), (1, 4)),)
    assert found[2] == (Box((1, 0), (2, 2)),)
    assert [sum(part.count for part in share) for share in found] == [2, 2, 2, 1, 1]


def test_the_remainder_wanders_with_the_salt() -> None:
    longer = [[share[0].shape[0] for share in shares(Box.whole((10, MIB)), itemsize=1, count=4, salt=salt)] for salt in (0, 3)]
    assert longer == [[3, 3, 2, 2], [3, 2, 2, 3]]


def test_nothing_is_written_of_a_box_without_elements() -> None:
    assert shares(Box((4, 0), (4, 8)), itemsize=4, count=2, salt=0) == [(), ()]


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_replica_outside_its_group_is_refused(index: int, count: int) -> None:
    with pytest.raises(LayoutUnsupported, match=f"replica {index} of {count} of box"):
        share_of(Box.whole((4,)), itemsize=4, index=index, count=count, salt=0)
