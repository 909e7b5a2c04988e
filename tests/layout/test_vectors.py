"""Resharding vectors known from DeepSpeed's and Megatron-Core's own tests, as plans over boxes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from elastickpt.format.arrays import Box
from elastickpt.layout.algebra import intersect, prove_coverage
from elastickpt.layout.grid import runs_of
from elastickpt.layout.placement import even, explicit, flat_boxes, physical_box, torch_chunk
from elastickpt.layout.reads import plan_reads

Degrees = tuple[int, int, int]  # pipeline, tensor, data parallel
Sizes = list[list[int]]  # of each rank, the sizes of its shards


def test_zero3_of_1024_elements_from_three_ranks_to_two() -> None:
    """V6: 342 each with 2 of padding at the end become 512 each; the padding reaches nobody."""
    whole = Box.whole((32, 32))
    padded = even(1024 + 2, 3)
    assert {stop - start for start, stop in padded} == {342}
    held = [flat_boxes(whole, start, min(stop, 1024)) for start, stop in padded]
    assert sum(box.count for box in held[2]) == 340
    assert prove_coverage((32, 32), [box for boxes in held for box in boxes]).exact
    moved = []
    for start, stop in even(1024, 2):
        wanted = flat_boxes(whole, start, stop)
        parts = [[intersect(a, b) for a in wanted for b in boxes] for boxes in held]
        moved.append([sum(part.count for part in found if part is not None) for found in parts])
    assert moved == [[342, 170, 0], [0, 172, 340]]


SHAPE_3D = (2, 2, 8)  # layers over pipeline stages, rows over tensor ranks, and what data ranks divide flat


def held_3d(degrees: Degrees) -> dict[Degrees, list[Box]]:
    """What the rank at each (pp, tp, dp) holds: a stage's layers, its rows of them, and of these a flat share."""
    pp, tp, dp = degrees
    held = {}
    for stage, shard, share in product(range(pp), range(tp), range(dp)):
        box = physical_box(SHAPE_3D, sizes=(pp, tp), coordinate=(stage, shard), placements=("S(0)", "S(1)"))
        held[stage, shard, share] = list(flat_boxes(box, *even(box.count, dp)[share]))
    return held


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ((1, 1, 1), [[0, 4, 1, 5, 2, 6, 3, 7]]),
        ((1, 2, 1), [[0, 4, 2, 6], [1, 5, 3, 7]]),
        ((1, 2, 2), [[0, 4], [1, 5], [2, 6], [3, 7]]),  # dp 0: tp 0, 1; dp 1: tp 0, 1
        ((2, 1, 1), [[0, 4, 1, 5], [2, 6, 3, 7]]),
    ],
)
def test_index_maps_of_three_dimensions(target: Degrees, expected: list[list[int]]) -> None:
    """V7: which old ranks feed which new one, in order, from pp2 x tp2 x dp2.

    Its text gives the lists only. They follow from ranks numbered with data parallel slowest and tensor parallel
    fastest, and from what each rank holds as above; the order is that of the new rank's elements.
    """
    old = {(dp * 2 + pp) * 2 + tp: boxes for (pp, tp, dp), boxes in held_3d((2, 2, 2)).items()}
    assert prove_coverage(SHAPE_3D, [box for boxes in old.values() for box in boxes]).exact
    new = held_3d(target)
    found = []
    for _, _, place in sorted((dp, pp * target[1] + tp, (pp, tp, dp)) for pp, tp, dp in new):
        feeds = [
            (part.start, rank)
            for wanted in new[place]
            for rank, boxes in old.items()
            for box in boxes
            if (part := intersect(wanted, box)) is not None
        ]
        found.append([rank for _, rank in sorted(feeds)])
    assert found == expected


def one_each(sizes: list[int]) -> Sizes:
    return [[size] for size in sizes]


UNEVEN: list[tuple[Sizes, Sizes]] = [
    (one_each([3] * 8), one_each([1] * 6 + [2, 16])),
    (one_each([1, 5, 7, 3, 6, 2, 5, 4]), one_each([14, 3, 6, 3, 1, 1, 2, 3])),
    (one_each([5] * 6 + [0, 0]), one_each([5, 0, 5, 0, 5, 5, 3, 7])),
    (one_each([15] + [0] * 7), one_each([0, 0, 0] + [3] * 5)),
    ([[4], [7, 8], [1], [1], [1], [1], [1], [3, 3]], [[2, 4], [], [5], [], [5, 9], [], [1, 1, 1, 1, 1], []]),
    ([[3]] * 8, [[2, 4]] * 4 + [[]] * 4),
    ([[2]] * 5 + [[10]] * 3, [[10]] * 3 + [[2]] * 5),
]


def shards(sizes: Sizes) -> list[list[Box]]:
    """Of each rank its shards, one after the other in rank order."""
    flat = [size for rank in sizes for size in rank]
    intervals = iter(explicit(sum(flat), flat))
    return [[Box((start,), (stop,)) for start, stop in (next(intervals) for _ in rank)] for rank in sizes]


@pytest.mark.parametrize(("source", "target"), UNEVEN)
def test_uneven_and_empty_shards_of_eight_ranks_all_land(source: Sizes, target: Sizes) -> None:
    """V8: every element of every new shard is read from exactly one old shard, in 1-D and as rows of 3."""
    extent = sum(map(sum, source))
    for width in ((), (3,)):
        shape = (extent, *width)
        whole = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
        old, new = (
            [Box((*box.start, *(0 for _ in width)), (*box.stop, *width)) for rank in shards(sizes) for box in rank]
            for sizes in (source, target)
        )
        assert prove_coverage(shape, old).exact
        assert prove_coverage(shape, new).exact
        runs = [run for box in old for run in runs_of(box, shape=shape, chunk_shape=shape, itemsize=4)]
        file = b"".join(whole[run.box.start[0] : run.box.stop[0]].tobytes() for run in runs)
        assert file == whole.tobytes(), "shards in rank order are the array"
        for wanted in new:
            found = bytearray(wanted.count * 4)
            for read in plan_reads(wanted, runs, block_nbytes=4, itemsize=4):
                for step in read.steps:
                    at = runs[read.piece].offset + step.source
                    found[step.target : step.target + step.nbytes] = file[at : at + step.nbytes]
            assert bytes(found) == whole[wanted.start[0] : wanted.stop[0]].tobytes()


def test_the_sizes_that_uneven_shards_add_up_to() -> None:
    """V8's lists are complete: source and target have the same number of elements, over eight ranks each."""
    for source, target in UNEVEN:
        assert len(source) == len(target) == 8
        assert sum(map(sum, source)) == sum(map(sum, target))


def test_a_vocabulary_that_moves_between_tensor_degrees_moves_in_few_pieces() -> None:
    """The bound of V5, at most source + target degree pieces, for every pair of degrees and an uneven vocabulary."""
    for extent, before, after in product((101, 128, 50_257), (1, 2, 4, 8), (1, 2, 4, 8)):
        pieces = [
            part
            for a in torch_chunk(extent, before)
            for b in torch_chunk(extent, after)
            if (part := intersect(Box((a[0],), (a[1],)), Box((b[0],), (b[1],)))) is not None
        ]
        assert prove_coverage((extent,), pieces).exact
        assert len(pieces) < before + after
