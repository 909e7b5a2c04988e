"""Vectors from what DeepSpeed, Megatron and the UCP paper test of their own converters, at plan level.

Further ones: `test_shapes_of_peers.py`; files of V11, V12: `tests/convert/test_sources.py`; V13: `tests/convert/test_grid.py`.
"""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest

from elastickpt.errors import ProgramFault
from elastickpt.language.flat import OrderedTensor, lay_flat
from elastickpt.language.held import HeldParts, HeldPiece, Strides, lower, prove_pieces, transfers
from elastickpt.language.scope import Scope
from tests.language.test_held_pieces import all_ranks, dims, gathered, places, split


def moved(source: list[HeldParts], target: list[HeldParts]) -> list[tuple[int, int, tuple[int, ...], Strides, Strides]]:
    """(source rank, target rank, extents, places) of everything that goes; of copies the lowest rank's."""
    given: dict[tuple[tuple[int, ...], Strides], tuple[int, HeldPiece]] = {}
    for rank, held in enumerate(source):
        for piece in held.pieces:
            given.setdefault((piece.extents, piece.whole), (rank, piece))
    sources = list(given.values())
    wanted = [(rank, piece) for rank, held in enumerate(target) for piece in held.pieces]
    found = transfers(prod(source[0].whole), [piece for _, piece in sources], [piece for _, piece in wanted])
    return [(sources[s][0], wanted[w][0], one.extents, one.source, one.target) for s, w, one in found]


def test_v1_rows_to_columns() -> None:
    """8 x 8, rows over 2 ranks to columns over 4: 8 segments of (4, 2)."""
    found = moved(all_ranks("a/tp  b", {"tp": 2}, a=8, b=8), all_ranks("a  b/tp", {"tp": 4}, a=8, b=8))
    assert len(found) == 8
    for source, target, extents, at, to in found:
        assert (extents, at.offset, at.strides) == ((4, 2), 2 * target, (8, 1))
        assert (to.offset, to.strides) == (8 * source, (2, 1))
    assert sum(prod(extents) for _, _, extents, _, _ in found) == 64


def test_v2_rows_of_which_some_are_on_all_ranks() -> None:
    """bigcode, 48 x 8: 32 rows are cut, 16 are copies. From the lowest holder 640 elements are rank 0's, 128 rank 1's."""
    text = "(q/tp + 16)  h"
    found = moved(all_ranks(text, {"tp": 2}, q=32, h=8), all_ranks(text, {"tp": 4}, q=32, h=8))
    assert sum(prod(extents) for _, _, extents, _, _ in found) == 768
    by_source = {rank: sum(prod(e) for s, _, e, _, _ in found if s == rank) for rank in (0, 1)}
    assert by_source == {0: 640, 1: 128}


def test_v3_heads_dealt_along_the_second_dimension() -> None:
    """yuan: (8, 64), 8 heads; rank r has the heads h with h % tp == r."""
    dense = np.arange(8 * 64).reshape(8, 64)
    for rank, local in enumerate(split("a  (heads%tp d)", {"tp": 4}, a=8, heads=8, d=8)):
        wanted = np.concatenate([dense[:, 8 * h : 8 * h + 8] for h in range(8) if h % 4 == rank], axis=1)
        assert np.array_equal(local, wanted)


@pytest.mark.parametrize("rows", [8, 16, 256])
def test_v3_pieces_do_not_grow_with_the_size(rows: int) -> None:
    """codegen: four blocks of q, v and k rows each; a rank has its heads of each part: as many pieces at any hidden size."""
    held = all_ranks("(4 (q/tp + v/tp + k/tp))  h", {"tp": 2}, q=rows, v=rows, k=rows, h=8)
    assert {len(one.pieces) for one in held} == {3}


@pytest.mark.parametrize(
    ("text", "widths"),
    [
        ("(7/tp:(3, 2, 2) + 5/tp:(2, 2, 1) + 3/tp:(1, 1, 1))  h", [6, 5, 4]),
        ("(9/tp:(4, 3, 2) + 9/tp:(3, 3, 3))  h", [7, 6, 5]),
    ],
)
def test_v4_parts_with_widths_of_their_own(text: str, widths: list[int]) -> None:
    held = all_ranks(text, {"tp": 3}, h=8)
    assert [one.local[0] for one in held] == widths
    assert prove_pieces(held[0].whole, [piece for one in held for piece in one.pieces]).exact


def test_v4_one_key_head_on_one_rank_of_each_pair() -> None:
    """MQA widths [1, 0] three times."""
    held = all_ranks("(1/tp:(1, 0) + 1/tp:(1, 0) + 1/tp:(1, 0))  h", {"tp": 2}, h=4)
    assert [one.local for one in held] == [(3, 4), (0, 4)]


@pytest.mark.parametrize(("source", "target"), list(product([1, 2, 4, 8], repeat=2)))
@pytest.mark.parametrize("vocab", [13, 32, 100, 50257])
def test_v5_vocabularies_with_poisoned_padding(source: int, target: int, vocab: int) -> None:
    """True rows arrive whatever stands in the padding, in at most as many pieces as there are ranks on both sides."""
    one = all_ranks("pad(v, 8*|tp|)/tp", {"tp": source}, v=vocab)
    other = all_ranks("pad(v, 8*|tp|)/tp", {"tp": target}, v=vocab)
    dense = np.full(one[0].whole, -7)
    dense[:vocab] = np.arange(vocab)
    locals_ = [piece for held in one for piece in held.pieces]
    true = [cut for piece in locals_ for cut in _below(piece, vocab)]
    wanted = [cut for held in other for piece in held.pieces for cut in _below(piece, vocab)]
    made = np.zeros(other[0].whole[0], dtype=int)
    segments = list(transfers(vocab, true, wanted))
    assert len(segments) <= source + target
    for s, w, segment in segments:
        rank = next(k for k, held in enumerate(one) if held.pieces[0].whole.offset == true[s].whole.offset)
        local = dense[one[rank].pieces[0].whole.offset :][: one[rank].local[0]]
        made[wanted[w].whole.offset + places(segment.target, segment.extents) - wanted[w].local.offset] = local[
            places(segment.source, segment.extents)
        ]
    assert made.tolist() == [*range(vocab), *[0] * (len(made) - vocab)]


def _below(piece: HeldPiece, rows: int) -> list[HeldPiece]:
    count = min(piece.extents[0] if piece.extents else 1, rows - piece.whole.offset)
    return [HeldPiece((count,), Strides(piece.whole.offset, (1,)), Strides(piece.local.offset, (1,)))] if count > 0 else []


def flat_ranks(text: str, ways: int, shapes: dict[str, tuple[int, ...]]):
    scope = Scope({}, {"dp": ways})
    order = [OrderedTensor(name, lower(dims(" ".join(map(str, shape)) or "(0)"), scope, {})) for name, shape in shapes.items()]
    (factor,) = dims(text)
    return [lay_flat(factor, order, scope, {"dp": rank}) for rank in range(ways)]


def test_v6_a_flat_parameter_loses_its_padding() -> None:
    """ZeRO-3, [1024]: 3 ranks have 342 each, 2 of them padding; 2 ranks then have 512, not 513."""
    three = flat_ranks("cat(o, pad |dp|)/dp", 3, {"w": (1024,)})
    assert [one.count for one in three] == [342, 342, 342]
    assert [sum(p.count for part in one.parts for p in part.held.pieces) for one in three] == [342, 342, 340]
    two = flat_ranks("cat(o, pad |dp|)/dp", 2, {"w": (1024,)})
    assert [one.count for one in two] == [512, 512]
    pieces = [[p for one in some for part in one.parts for p in part.held.pieces] for some in (three, two)]
    found = list(transfers(1024, *pieces))
    assert [one.count for _, _, one in found] == [342, 170, 172, 340]


@pytest.mark.parametrize("text", ["pad(cat(o), 2*|dp|)/dp", "cat(o, pad |dp|)/dp", "cat(o)/dp:chunk", "cat(o)/dp:balanced"])
@pytest.mark.parametrize("ways", [1, 2, 3, 5])
def test_v6_flat_ranges_hold_every_element_once(text: str, ways: int) -> None:
    shapes = {"a": (7, 3), "b": (5,), "c": (2, 2, 2), "d": (1,)}
    seen = {name: np.zeros(prod(shape), dtype=int) for name, shape in shapes.items()}
    for one in flat_ranks(text, ways, shapes):
        taken = np.zeros(one.count, dtype=int)
        for part in one.parts:
            for piece in part.held.pieces:
                np.add.at(seen[part.name], places(piece.whole, piece.extents), 1)
                np.add.at(taken, places(piece.local, piece.extents), 1)
        assert taken.max(initial=0) <= 1
    assert all((one == 1).all() for one in seen.values())


def test_a_flat_tensor_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ProgramFault, match="cannot be cut evenly 3 ways"):
        flat_ranks("cat(o)/dp", 3, {"a": (7,)})
    with pytest.raises(ProgramFault, match="expected cat"):
        flat_ranks("8/dp", 2, {"a": (8,)})


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ((1, 1, 1), [[0, 4, 1, 5, 2, 6, 3, 7]]),
        ((1, 2, 1), [[0, 4, 2, 6], [1, 5, 3, 7]]),
        ((2, 1, 1), [[0, 4, 1, 5], [2, 6, 3, 7]]),
    ],
)
def test_v7_which_old_ranks_a_new_rank_takes(target: tuple[int, int, int], wanted: list[list[int]]) -> None:
    """Old ranks on 2 x 2 x 2 are numbered with dp slowest, then pp, then tp; a new one lists them by pp, tp, dp."""
    pp, tp, dp = target
    old = np.arange(8).reshape(2, 2, 2)  # dp, pp, tp
    assert dp == 1  # 122 shares old stages between new data-parallel ranks: who reads what, and no layout
    flat = [int(old[d, p, k]) for p, k, d in product(range(2), range(2), range(2))]
    held = all_ranks("(a/pp b/tp c)", {"pp": pp, "tp": tp}, a=2, b=2, c=2)
    assert [local.reshape(-1).tolist() for local in gathered(held, np.array(flat))] == wanted


V8 = [
    ([3] * 8, [1] * 6 + [2, 16]),
    ([1, 5, 7, 3, 6, 2, 5, 4], [14, 3, 6, 3, 1, 1, 2, 3]),
    ([5] * 6 + [0, 0], [5, 0, 5, 0, 5, 5, 3, 7]),
    ([15] + [0] * 7, [0, 0, 0] + [3] * 5),
]


@pytest.mark.parametrize(("source", "target"), V8)
def test_v8_uneven_and_empty_shares(source: list[int], target: list[int]) -> None:
    total = sum(source)
    assert sum(target) == total
    sides = [all_ranks(f"v/x:({', '.join(map(str, some))})", {"x": 8}, v=total) for some in (source, target)]
    locals_ = gathered(sides[0], np.arange(total))
    made = [np.full(n, -1) for n in target]
    for s, t_, extents, at, to in moved(*sides):
        made[t_][places(to, extents)] = locals_[s][places(at, extents)]
    assert [one.tolist() for one in made] == [one.tolist() for one in gathered(sides[1], np.arange(total))]


@pytest.mark.parametrize(
    ("text", "ways", "sizes"),
    [
        ("v/tp:balanced", 2, [51, 50]),
        ("w/tp:balanced", 3, [4, 3, 3]),
        ("w/tp:balanced", 4, [3, 3, 2, 2]),
        ("(heads/tp:balanced 64)", 4, [128, 128, 64, 64]),
        ("(few/tp:balanced 3)", 3, [6, 3, 3]),
    ],
)
def test_v10_uneven_tensor_parallelism(text: str, ways: int, sizes: list[int]) -> None:
    assert [one.local[0] for one in all_ranks(text, {"tp": ways}, v=101, w=10, heads=6, few=4)] == sizes


@pytest.mark.parametrize("ways", [1, 2, 4, 8])
def test_v11_experts_over_any_number_of_ranks_that_divides(ways: int) -> None:
    assert [one.local[0] for one in all_ranks("experts/ep", {"ep": ways}, experts=8)] == [8 // ways] * ways


def test_v11_three_do_not_divide_eight() -> None:
    with pytest.raises(ProgramFault, match="8 cannot be cut evenly 3 ways"):
        all_ranks("experts/ep", {"ep": 3}, experts=8)


def test_v12_rows_merged_on_the_wrong_dimension_do_not_fit() -> None:
    """[2048, 512] on each of 4 ranks: columns of [2048, 2048]. The program that says rows has another whole."""
    assert all_ranks("a  b/tp", {"tp": 4}, a=2048, b=2048)[0].whole == (2048, 2048)
    assert all_ranks("a/tp  b", {"tp": 4}, a=8192, b=512)[0].whole == (8192, 512)


def test_v12_gate_and_up_of_two_ranks() -> None:
    """gate 0, up 0, gate 1, up 1 lie so on the ranks; the whole has all of gate first: w[1, 0] tells."""
    held = all_ranks("(2 f/tp)  h", {"tp": 2}, f=2, h=1)
    locals_ = [np.array([["gate0"], ["up0"]]), np.array([["gate1"], ["up1"]])]
    whole = np.empty(4, dtype="U5")
    for one, local in zip(held, locals_, strict=True):
        for piece in one.pieces:
            whole[places(piece.whole, piece.extents)] = local.reshape(-1)[places(piece.local, piece.extents)]
    assert whole.tolist() == ["gate0", "gate1", "up0", "up1"]
