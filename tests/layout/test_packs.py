"""Placement packed as values: grids, shares of replicas, places in packs."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.format.arrays import Box, Mesh
from elastickpt.layout import packs
from elastickpt.layout.algebra import prove_coverage
from elastickpt.layout.grid import CHUNK_NBYTES, chunk_nbytes, chunks
from elastickpt.layout.packs import Cutting, Shared, packed_chunk_shape, place_slots, share_out, slots_of
from elastickpt.layout.placement import physical_box, replica_ranks

MIB = 1 << 20


@given(st.lists(st.integers(1, 3 * MIB), max_size=30))
def test_slots_are_aligned_and_do_not_overlap(sizes: list[int]) -> None:
    """[FRAG-62]"""
    offsets, nbytes = place_slots(sizes)
    for offset, size in zip(offsets, sizes, strict=True):
        assert offset % (4096 if size >= MIB else 64) == 0
    ends = [0, *(offset + size for offset, size in zip(offsets, sizes, strict=True))]
    for end, offset in zip(ends, offsets, strict=False):
        assert 0 <= offset - end < 4096
    assert nbytes % 4096 == 0
    assert 0 <= nbytes - ends[-1] < 4096


@given(
    st.integers(1, 5).flatmap(lambda count: st.tuples(st.just(count), st.permutations(range(6)))),
    st.lists(st.integers(0, 9), min_size=6, max_size=6),
    st.lists(st.sampled_from(["whole", "first", "cut"]), min_size=6, max_size=6),
)
def test_replicas_store_each_box_once_however_it_is_listed(
    given: tuple[int, list[int]], rows: list[int], ways: list[str]
) -> None:
    """Of what is held alone, not of its order. [SAVE-116, SAVE-117, FRAG-63]"""
    count, order = given
    shared = [
        Shared(
            f"key{n}", Box.whole((extent, 3)), 1, (0, -(-extent // count)) if way == "cut" and extent else None, way == "first"
        )
        for n, (extent, way) in enumerate(zip(rows, ways, strict=True))
    ]
    shares = [share_out(shared, count, index) for index in range(count)]
    for number, one in enumerate(shared):
        stored = [share[number] for share in shares]
        assert prove_coverage(one.box.shape, [box for box in stored if box is not None]).exact
        if one.by_first and one.box.count:
            assert stored[0] == one.box
    listed = [shared[n] for n in order]
    for index in range(count):
        assert [share_out(listed, count, index)[k] for k in range(6)] == [shares[index][n] for n in order]


def test_many_boxes_weigh_the_same_on_all_replicas() -> None:
    """[SAVE-116]"""
    shared = [Shared(f"{n:04}", Box.whole((1 + n * 37 % 1000,)), 4) for n in range(999)]
    sums = [sum(box.count for box in share_out(shared, 7, index) if box) for index in range(7)]
    assert max(sums) - min(sums) <= 10


@given(st.data())
def test_one_large_box_is_shared_out_evenly(data: st.DataObject) -> None:
    """[SAVE-117]"""
    rows, replicas = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 9))
    cutting = Cutting((rows, 64 * MIB), 1, (rows, 64 * MIB), (0, 0), True)
    found = cutting.division(replicas)
    assert found is not None
    assert found == (0, -(-rows // replicas))
    extent = cutting.chunk_shape(replicas=replicas)[0]
    assert found[1] % extent == 0


_MESHES = st.sampled_from(
    [((4,), ("S(0)",)), ((2, 2), ("S(0)", "S(1)")), ((2, 3), ("R", "S(0)")), ((4, 2), ("_S(0)", "S(0)")), ((3,), ("S(1)",))]
)


@given(_MESHES, st.tuples(st.integers(0, 17), st.integers(0, 9)))
def test_every_layout_stores_every_element_once_in_slots_of_its_grid(
    mesh_of: tuple[tuple[int, ...], tuple[str, ...]], shape: tuple[int, int]
) -> None:
    """With regular cuts each chunk is whole in one slot of one writer. [FRAG-60, FRAG-61, FRAG-66]"""
    sizes, placements = mesh_of
    ranks = list(product(*map(range, sizes)))
    mesh = Mesh("m", tuple(f"a{k}" for k in range(len(sizes))), sizes, tuple(range(len(ranks))))
    boxes, slots, regular, grid = [], [], True, ()
    for rank, place in enumerate(ranks):
        held = physical_box(shape, sizes=sizes, coordinate=place, placements=placements)
        group = replica_ranks(mesh, placements, rank)
        cutting = Cutting.of(shape, 4, mesh.sizes, placements, held)
        grid, regular = cutting.chunk_shape(replicas=len(group)), cutting.regular
        (mine,) = share_out([Shared("k", held, 4, cutting.division(len(group)))], len(group), group.index(rank))
        for slot in slots_of(mine, shape=shape, chunk_shape=grid, itemsize=4) if mine else ():
            slots.append(slot)
            boxes += [run.box for run in slot.runs]
    assert prove_coverage(shape, boxes).exact
    if regular:
        assert sorted(slot.runs[0].chunk for slot in slots) == [index for index, _ in chunks(shape, grid)]
        assert {slot.nbytes for slot in slots} <= {chunk_nbytes(grid, itemsize=4)}
    for slot in slots:
        ends = [
            run.offset + run.nbytes // run.row_nbytes * run.row_stride - (run.row_stride - run.row_nbytes) for run in slot.runs
        ]
        assert max(ends) <= slot.nbytes


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_what_size_alone_cuts_has_pads_below_a_row_a_chunk(rows: int, mib: int) -> None:
    """[FRAG-60]"""
    shape = (rows, mib * MIB // 16)
    chunk = packed_chunk_shape(shape, itemsize=1, cuts=(0, 0))
    assert prod(chunk) <= CHUNK_NBYTES
    if chunk[1] == shape[1]:
        count = -(-rows // chunk[0])
        assert count * chunk[0] - rows < count
        assert prod(shape) <= CHUNK_NBYTES * count


def test_300_mb_of_one_writer_make_a_pack_of_at_most_303() -> None:
    """[FRAG-60, FRAG-62]"""
    for shape in ((300_000, 250), (75_000_000,), (9_999, 7_500), (3, 25_000_000), (75, 1_000_000)):
        cutting = Cutting.of(shape, 4, None, (), Box.whole(shape))
        grid = cutting.chunk_shape(replicas=1)
        slots = list(slots_of(Box.whole(shape), shape=shape, chunk_shape=grid, itemsize=4))
        _, nbytes = place_slots([slot.nbytes for slot in slots])
        assert nbytes <= 303_000_000


def test_chunks_end_where_ranks_do() -> None:
    """A rank's part of more than 256 MiB is cut into parts that divide it. [FRAG-60]"""
    for rows in (64128, 75968, 25129):
        chunk = packed_chunk_shape((2 * rows, 8192), itemsize=4, cuts=(rows, 0))
        assert rows % chunk[0] == 0
        assert prod(chunk) * 4 <= CHUNK_NBYTES


def test_slots_of_nothing() -> None:
    assert list(slots_of(Box((2, 0), (2, 3)), shape=(4, 3), chunk_shape=(2, 3), itemsize=4)) == []


@pytest.mark.parametrize("alignment", [64, 4096])
def test_aligned(alignment: int) -> None:
    found = [packs.aligned(offset, alignment) for offset in (0, 1, alignment, alignment + 1)]
    assert found == [0, alignment, alignment, 2 * alignment]
    assert all(low <= high for low, high in pairwise(found))
