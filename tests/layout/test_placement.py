"""Placements against a dense array that is sharded by hand, one step after the other."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import LayoutUnsupported, Malformed
from elastickpt.format.arrays import Box, Mesh
from elastickpt.layout.algebra import intersect, prove_coverage
from elastickpt.layout.placement import cuts_of, physical_box, places_that_hold, replica_ranks, share_of

law = settings(max_examples=150, deadline=None)
Shape = tuple[int, ...]
Placements = tuple[str, ...]


def chunked(array: np.ndarray, ways: int, *, dim: int) -> list[np.ndarray]:
    """`torch.chunk`, with empty arrays for the ways that it leaves out."""
    step = max(-(-array.shape[dim] // ways), 1)
    return [np.take(array, range(array.shape[dim])[k * step : (k + 1) * step], axis=dim) for k in range(ways)]


def sharded_by_hand(whole: np.ndarray, *, sizes: Shape, coordinate: Shape, placements: Placements) -> np.ndarray:
    """First all plain shards (tensor parallelism), then the strided ones (FSDP2 of what is left)."""
    local = whole
    for prefix in ("S(", "_S("):
        for size, index, placement in zip(sizes, coordinate, placements, strict=True):
            if placement.startswith(prefix):
                local = chunked(local, size, dim=int(placement[len(prefix) : -1]))[index]
    return local


def numbered(shape: Shape) -> np.ndarray:
    return np.arange(prod(shape)).reshape(shape)


def inside(whole: np.ndarray, box: Box) -> np.ndarray:
    return whole[tuple(map(slice, box.start, box.stop))]


@st.composite
def sharded_arrays(draw: st.DrawFn) -> tuple[Shape, Shape, Placements]:
    shape = tuple(draw(st.lists(st.integers(0, 23), max_size=3)))
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    splits = [f"{kind}({dim})" for kind in ("S", "_S") for dim in range(len(shape))]
    return shape, sizes, tuple(draw(st.sampled_from(["R", *splits])) for _ in sizes)


@law
@given(sharded_arrays(), st.data())
def test_who_holds_any_of_a_box_is_found_without_asking_everybody(
    case: tuple[Shape, Shape, Placements], data: st.DataObject
) -> None:
    shape, sizes, placements = case
    ends = [sorted(data.draw(st.tuples(st.integers(0, extent), st.integers(0, extent)))) for extent in shape]
    within = Box(tuple(low for low, _ in ends), tuple(high for _, high in ends))
    boxes = [
        physical_box(shape, sizes=sizes, coordinate=coordinate, placements=placements)
        for coordinate in product(*(range(size) for size in sizes))
    ]
    expected = tuple(place for place, box in enumerate(boxes) if intersect(box, within) is not None)
    assert places_that_hold(within, shape=shape, sizes=sizes, placements=placements) == expected


def test_who_holds_a_row_of_a_large_mesh_is_found_at_once() -> None:
    row = Box((123_456, 0), (123_457, 8))
    mesh = {"shape": (1 << 20, 8), "sizes": (1 << 14, 1 << 10), "placements": ("S(0)", "S(0)")}
    assert places_that_hold(row, **mesh) == (123_456 // 64 << 10 | 123_456 % 64,)  # type: ignore[arg-type]


def test_who_holds_what_is_refused_for_a_mesh_of_other_axes() -> None:
    with pytest.raises(LayoutUnsupported, match="on a mesh of sizes"):
        places_that_hold(Box((0,), (1,)), shape=(4,), sizes=(2, 2), placements=("R",))


@law
@given(sharded_arrays())
def test_a_box_is_what_sharding_by_hand_leaves(case: tuple[Shape, Shape, Placements]) -> None:
    shape, sizes, placements = case
    whole = numbered(shape)
    for coordinate in product(*map(range, sizes)):
        box = physical_box(shape, sizes=sizes, coordinate=coordinate, placements=placements)
        local = sharded_by_hand(whole, sizes=sizes, coordinate=coordinate, placements=placements)
        assert np.array_equal(inside(whole, box), local)


def test_the_strided_trap_of_50257_rows() -> None:
    """torch's own `compute_local_shape_and_global_offset` names other rows here than the rank physically has."""
    sizes, placements = (4, 2), ("_S(0)", "S(0)")
    boxes = {
        place: physical_box((50_257, 8), sizes=sizes, coordinate=place, placements=placements)
        for place in product(range(4), range(2))
    }
    assert boxes[3, 0] == Box((18_849, 0), (25_129, 8))
    assert boxes[3, 0].shape[0] == 6280
    assert boxes[0, 1] == Box((25_129, 0), (31_411, 8))
    assert [boxes[k, 1].shape[0] for k in range(4)] == [6282] * 4
    assert prove_coverage((50_257, 8), list(boxes.values())).exact
    swapped = physical_box((50_257, 8), sizes=(2, 4), coordinate=(0, 3), placements=("S(0)", "_S(0)"))
    assert swapped == boxes[3, 0], "the order of the mesh axes is without effect"


def test_plain_shards_of_one_dimension_apply_from_left_to_right() -> None:
    """Two plain shards are nested chunks: 10 over 2, then 5 over 2 is 3 and 2."""
    boxes = [
        physical_box((10,), sizes=(2, 2), coordinate=place, placements=("S(0)", "S(0)"))
        for place in product(range(2), range(2))
    ]
    assert [(box.start[0], box.stop[0]) for box in boxes] == [(0, 3), (3, 5), (5, 8), (8, 10)]


def test_ranks_without_rows_have_an_empty_box_at_the_end() -> None:
    boxes = [physical_box((5, 2), sizes=(4,), coordinate=(k,), placements=("S(0)",)) for k in range(4)]
    assert boxes == [Box((0, 0), (2, 2)), Box((2, 0), (4, 2)), Box((4, 0), (5, 2)), Box((5, 0), (5, 2))]


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("P", "expected R, S"),
        ("S(-1)", "expected R, S"),
        ("S(0) ", "expected R, S"),
        ("S(01)", "expected R, S"),
        ("S(2)", "the array has 2 dimensions"),
    ],
)
def test_placements_that_are_none_are_refused(placement: str, message: str) -> None:
    with pytest.raises(LayoutUnsupported, match=message):
        physical_box((4, 4), sizes=(2,), coordinate=(0,), placements=(placement,))


def test_a_coordinate_must_be_on_the_mesh() -> None:
    with pytest.raises(LayoutUnsupported, match=r"coordinate \(2,\)"):
        physical_box((4,), sizes=(2,), coordinate=(2,), placements=("S(0)",))
    with pytest.raises(LayoutUnsupported, match=r"coordinate \(0, 0\)"):
        physical_box((4,), sizes=(2,), coordinate=(0, 0), placements=("S(0)",))
    with pytest.raises(LayoutUnsupported, match="on a mesh of sizes"):
        cuts_of((4,), (2,), ())


def boundaries(shape: Shape, sizes: Shape, placements: Placements, dim: int) -> set[int]:
    """Where ranks meet on a dimension, its ends included, found by asking every rank."""
    found = {0, shape[dim]}
    for coordinate in product(*map(range, sizes)):
        box = physical_box(shape, sizes=sizes, coordinate=coordinate, placements=placements)
        if box.start[dim] < box.stop[dim]:
            found |= {box.start[dim], box.stop[dim]}
    return found


@law
@given(sharded_arrays())
def test_cuts_are_regular_exactly_where_the_boundaries_are(case: tuple[Shape, Shape, Placements]) -> None:
    shape, sizes, placements = case
    cuts = cuts_of(shape, sizes, placements)
    assert len(cuts) == len(shape)
    for dim, extent in enumerate(shape):
        found = sorted(boundaries(shape, sizes, placements, dim))
        regular = [step for step in range(1, extent) if found == [*range(0, extent, step), extent]]
        assert cuts[dim] == (regular[0] if regular else 0)


def test_cuts_of_usual_layouts() -> None:
    assert cuts_of((101, 64), (2,), ("S(0)",)) == (51, 0)
    assert cuts_of((64, 10), (2, 4), ("R", "S(1)")) == (0, 3)
    assert cuts_of((64, 64), (4, 2), ("_S(0)", "S(0)")) == (8, 0)
    assert cuts_of((50_257, 64), (4, 2), ("_S(0)", "S(0)")) == (0, 0)  # 6283, 6280, then 6282: no grid
    assert cuts_of((64,), (1,), ("S(0)",)) == (0,)
    assert cuts_of((1,), (4,), ("S(0)",)) == (0,)
    assert cuts_of((), (4,), ("R",)) == ()


def test_replicas_differ_on_replicated_axes_only() -> None:
    mesh = Mesh("hsdp", ("replicate", "shard"), (2, 3), tuple(range(10, 16)))
    assert replica_ranks(mesh, ("R", "S(0)"), 14) == (11, 14)
    assert replica_ranks(mesh, ("R", "R"), 12) == tuple(range(10, 16))
    assert replica_ranks(mesh, ("S(0)", "S(1)"), 12) == (12,)
    shuffled = Mesh("hsdp", ("replicate", "shard"), (2, 2), (3, 0, 2, 1))
    assert replica_ranks(shuffled, ("R", "S(0)"), 2) == (3, 2), "in the order of the mesh, not of the ranks"
    with pytest.raises(Malformed, match="has no rank 9"):
        replica_ranks(mesh, ("R", "S(0)"), 9)
    with pytest.raises(LayoutUnsupported, match="on mesh 'hsdp'"):
        replica_ranks(mesh, ("R",), 10)


@law
@given(sharded_arrays())
def test_replicas_hold_one_box_and_agree_who_they_are(case: tuple[Shape, Shape, Placements]) -> None:
    shape, sizes, placements = case
    mesh = Mesh("m", tuple(map(str, range(len(sizes)))), sizes, tuple(range(prod(sizes))))
    for rank in mesh.ranks:
        group = replica_ranks(mesh, placements, rank)
        boxes = {physical_box(shape, sizes=sizes, coordinate=mesh.coordinate(other), placements=placements) for other in group}
        assert rank in group
        assert len(boxes) == 1
        assert {replica_ranks(mesh, placements, other) for other in group} == {group}


MESHES: dict[str, tuple[Shape, tuple[Placements, ...]]] = {
    "hsdp x tp 2x3x4": ((2, 3, 4), (("R", "S(0)", "S(1)"), ("R", "_S(0)", "S(0)"), ("R", "S(0)", "R"))),
    "fsdp x tp 16x8": ((16, 8), (("_S(0)", "S(0)"), ("S(0)", "S(1)"), ("S(0)", "R"), ("R", "S(1)"))),
    "tp x fsdp 2x4": ((2, 4), (("S(0)", "_S(0)"), ("S(1)", "S(0)"))),
    "one axis of 4": ((4,), (("S(0)",), ("S(1)",), ("R",))),
}
SHAPES = [(10, 4), (101, 2), (50_257, 16), (3, 5), (1, 1), (0, 8), (1024, 300)]


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_simulated_ranks_write_every_element_exactly_once(name: str, shape: Shape) -> None:
    """What all ranks of a mesh would write of an array: their boxes, each divided over its replicas."""
    sizes, choices = MESHES[name]
    mesh = Mesh("m", tuple("abc"[: len(sizes)]), sizes, tuple(range(prod(sizes))))
    for placements in choices:
        written = []
        for rank in mesh.ranks:
            place = mesh.coordinate(rank)
            box = physical_box(shape, sizes=sizes, coordinate=place, placements=placements)
            group = replica_ranks(mesh, placements, rank)
            written += share_of(box, itemsize=4, index=group.index(rank), count=len(group), salt=5)
        assert prove_coverage(shape, written).exact
        if shape[0] < prod(sizes) and "R" not in placements and shape[0]:
            assert len(written) < len(mesh.ranks), "some ranks have nothing to write"
