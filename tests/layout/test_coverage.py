"""Coverage proofs against counting every element."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import CoverageGap, CoverageOverlap, Malformed
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.layout import algebra
from elastickpt.layout.algebra import LISTED, CoverageReport, intersect, prove_box_coverage, prove_coverage, require_coverage
from elastickpt.layout.placement import balanced, flat_boxes

law = settings(max_examples=200, deadline=None)
Shape = tuple[int, ...]


@st.composite
def boxes_in(draw: st.DrawFn, shape: Shape) -> Box:
    pairs = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(low for low, _ in pairs), tuple(high for _, high in pairs))


@st.composite
def any_boxes(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    return shape, draw(st.lists(boxes_in(shape), max_size=6))


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    """A region cut in two, and again, in any direction: exact covers."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    found = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 9))):
        box = found.pop(draw(st.integers(0, len(found) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(box.start[axis], box.stop[axis]))
        found.append(Box(box.start, (*box.stop[:axis], at, *box.stop[axis + 1 :])))
        found.append(Box((*box.start[:axis], at, *box.start[axis + 1 :]), box.stop))
    return shape, draw(st.permutations(found))


def counted(shape: Shape, boxes: tuple[Box, ...] | list[Box]) -> np.ndarray:
    """How often each element is covered."""
    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        counts[tuple(map(slice, box.start, box.stop))] += 1
    return counts


def assert_true(report: CoverageReport, shape: Shape, boxes: list[Box]) -> None:
    """Everything that the report says is so, and it says everything unless a list is full."""
    counts = counted(shape, boxes)
    assert report.exact == bool((counts == 1).all())
    gaps = counted(shape, report.gaps)
    pairs = {(i, j): common for i, j, common in report.overlaps}
    assert ((gaps == 0) | (counts == 0)).all()
    assert gaps.max(initial=0) <= 1
    assert len(pairs) == len(report.overlaps) <= LISTED
    for (i, j), common in pairs.items():
        assert i < j
        assert intersect(boxes[i], boxes[j]) == common
    if len(report.gaps) < LISTED and len(report.overlaps) < LISTED:
        assert np.array_equal(gaps == 1, counts == 0)
        every = {(i, j) for j in range(len(boxes)) for i in range(j) if intersect(boxes[i], boxes[j]) is not None}
        assert set(pairs) == every


@law
@given(any_boxes())
def test_a_report_is_true_and_complete(case: tuple[Shape, list[Box]]) -> None:
    assert_true(prove_coverage(*case), *case)


@law
@given(partitions())
def test_a_partition_covers_exactly(case: tuple[Shape, list[Box]]) -> None:
    assert prove_coverage(*case) == CoverageReport()


@law
@given(partitions(), st.data())
def test_a_partition_with_one_box_too_few_or_too_many_is_found_out(case: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    shape, boxes = case
    number = data.draw(st.sampled_from([k for k, box in enumerate(boxes) if box.count]))
    less, more = boxes[:number] + boxes[number + 1 :], [*boxes, boxes[number]]
    assert prove_coverage(shape, less).gaps
    assert_true(prove_coverage(shape, less), shape, less)
    assert (number, len(boxes), boxes[number]) in prove_coverage(shape, more).overlaps


def test_a_pinwheel_has_no_plane_between_boxes_and_is_proved() -> None:
    shape = (3, 3)
    wheel = [Box((0, 0), (1, 2)), Box((0, 2), (2, 3)), Box((2, 1), (3, 3)), Box((1, 0), (3, 1)), Box((1, 1), (2, 2))]
    assert prove_coverage(shape, wheel).exact
    assert prove_coverage(shape, wheel[:4]).gaps == (wheel[4],)


def test_arrays_of_one_and_of_no_element() -> None:
    point = Box((), ())
    assert prove_coverage((), [point]).exact
    assert prove_coverage((), []).gaps == (point,)
    assert prove_coverage((), [point, point]).overlaps == ((0, 1, point),)
    assert prove_coverage((0, 4), []).exact
    assert prove_coverage((0, 4), [Box((0, 0), (0, 4))] * 2).exact


def test_empty_boxes_are_ignored_wherever_they_stand() -> None:
    assert prove_coverage((4,), [Box((2,), (2,)), Box((0,), (4,)), Box((4,), (4,))]).exact


def test_a_region_is_proved_in_its_own_frame() -> None:
    region = Box((2, 2), (4, 6))
    assert prove_box_coverage(region, [Box((2, 2), (3, 6)), Box((3, 2), (4, 6))]).exact
    assert prove_box_coverage(region, [Box((2, 2), (3, 6))]).gaps == (Box((3, 2), (4, 6)),)
    with pytest.raises(Malformed, match=r"box 0 \[1:4, 2:6\] reaches beyond \[2:4, 2:6\]"):
        prove_box_coverage(region, [Box((1, 2), (4, 6))])


def test_lists_are_bounded() -> None:
    assert len(prove_coverage((100,), [Box((k,), (k + 1,)) for k in range(0, 100, 2)]).gaps) == LISTED
    assert len(prove_coverage((10, 10), [Box.whole((10, 10))] * 1000).overlaps) == LISTED


ROWS = 10_007
WHOLE = Box.whole((ROWS, 60))
MANY = {
    "rows": [Box((low, 0), (high, 60)) for low, high in balanced(ROWS, 2000)],
    "columns": [Box((0, low), (ROWS, high)) for low, high in balanced(60, 60)],
    "grid": [Box((a, c), (b, d)) for a, b in balanced(ROWS, 50) for c, d in balanced(60, 40)],
    "flat": [box for low, high in balanced(ROWS * 60, 700) for box in flat_boxes(WHOLE, low, high)],
    "staggered": [Box((a, c), (b, c + 1)) for c in range(60) for a, b in balanced(ROWS, 40 - c // 2)],
}


@pytest.mark.parametrize("kind", MANY)
def test_the_work_for_usual_covers_is_nearly_linear(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in boxes looked at, so that a quadratic proof fails on any machine."""
    looked_at = 0
    slabs = algebra._slabs

    def counting(items: list[algebra.SplitItem], *rest: int) -> list[tuple[int, int, list[algebra.SplitItem]]]:
        nonlocal looked_at
        looked_at += len(items)
        return slabs(items, *rest)

    monkeypatch.setattr(algebra, "_slabs", counting)
    boxes = MANY[kind].copy()
    random.Random(7).shuffle(boxes)
    assert prove_coverage(WHOLE.shape, boxes).exact
    assert looked_at <= 12 * len(boxes)


SPEC = ArraySpec(ArrayId("params", "model", "head.weight", "value"), (4, 4), "float32")


def test_an_exact_cover_is_accepted() -> None:
    require_coverage(SPEC, [Box((0, 0), (2, 4)), Box((2, 0), (4, 4))], ["writer 0", "writer 1"])


def test_a_gap_names_array_box_and_writers() -> None:
    with pytest.raises(CoverageGap, match=r"head\.weight/value of shape \(4, 4\): nobody wrote \[2:4, 0:4\]") as caught:
        require_coverage(SPEC, [Box((0, 0), (2, 4))], ["writer 3"])
    assert "written by writer 3" in caught.value.message
    with pytest.raises(CoverageGap, match="written by nobody"):
        require_coverage(SPEC, [], [])


def test_an_overlap_names_array_box_and_both_writers() -> None:
    boxes = [Box((0, 0), (3, 4)), Box((2, 0), (4, 4))]
    with pytest.raises(CoverageOverlap, match=r"\[2:3, 0:4\] was written twice, by writer 5 .* and by writer 7"):
        require_coverage(SPEC, boxes, ["writer 5", "writer 7"])


def test_a_box_beyond_the_array_names_its_writer() -> None:
    for box in (Box((0, 0), (4, 5)), Box((0,), (4,))):
        with pytest.raises(Malformed, match=r"params/model/head\.weight/value: writer 9: .* reaches beyond \[0:4, 0:4\]"):
            require_coverage(SPEC, [box], ["writer 9"])
