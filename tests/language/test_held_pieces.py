"""What ranks hold by a program's dimensions: every element of the whole once, every element of a local tensor once."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import ProgramFault
from elastickpt.language import tree as t
from elastickpt.language.held import HeldParts, HeldPiece, Strides, flat_part, lower, prove_pieces, transfers
from elastickpt.language.parse import parse
from elastickpt.language.scope import Scope


def dims(text: str) -> tuple[t.Factor, ...]:
    line = parse(f"ucl 1\nx  {text}\n").statements[0]
    assert isinstance(line, t.RuleLine)
    assert isinstance(line.dims, tuple)
    return line.dims


def places(side: Strides, extents: tuple[int, ...]) -> np.ndarray:
    found = np.full(extents, side.offset)
    for axis, stride in enumerate(side.strides):
        shape = [1] * len(extents)
        shape[axis] = -1
        found = found + (np.arange(extents[axis]) * stride).reshape(shape)
    return found.reshape(-1)


def gathered(held: list[HeldParts], dense: np.ndarray) -> list[np.ndarray]:
    """The local tensors that ranks have of a dense array."""
    found = []
    for one in held:
        local = np.full(prod(one.local), -1, dtype=dense.dtype)
        for piece in one.pieces:
            assert (local[places(piece.local, piece.extents)] == -1).all()
            local[places(piece.local, piece.extents)] = dense.reshape(-1)[places(piece.whole, piece.extents)]
        assert (local >= 0).all()
        found.append(local.reshape(one.local))
    return found


def all_ranks(text: str, axes: dict[str, int], **constants: int | tuple[int, ...]) -> list[HeldParts]:
    scope = Scope(constants, axes)
    return [lower(dims(text), scope, dict(zip(axes, at, strict=True))) for at in product(*map(range, axes.values()))]


def split(text: str, axes: dict[str, int], **constants: int | tuple[int, ...]) -> list[np.ndarray]:
    held = all_ranks(text, axes, **constants)
    dense = np.arange(prod(held[0].whole)).reshape(held[0].whole)
    return gathered(held, dense)


def test_grouped_heads_are_whole_groups() -> None:
    one, two = split("(groups/tp (q + 1 + 1) d)  h", {"tp": 2}, groups=4, q=2, d=3, h=2)
    assert one.reshape(-1).tolist() == list(range(48))
    assert two.reshape(-1).tolist() == list(range(48, 96))


def test_parts_that_are_each_divided_lie_end_to_end_on_each_rank() -> None:
    one, two = split("(2 f/tp)  h", {"tp": 2}, f=4, h=1)
    assert one.reshape(-1).tolist() == [0, 1, 4, 5]  # gate, then up
    assert two.reshape(-1).tolist() == [2, 3, 6, 7]
    one, two = split("(heads/tp d + kv/tp d + kv/tp d)", {"tp": 2}, heads=4, kv=2, d=1)
    assert one.tolist() == [0, 1, 4, 6]
    assert two.tolist() == [2, 3, 5, 7]


def test_uneven_shares() -> None:
    assert [len(one) for one in split("v/tp:(51, 50)", {"tp": 2}, v=101)] == [51, 50]
    assert [len(one) for one in split("v/tp:chunk", {"tp": 4}, v=10)] == [3, 3, 3, 1]
    assert [len(one) for one in split("v/tp:balanced", {"tp": 4}, v=10)] == [3, 3, 2, 2]
    assert [len(one) for one in split("l/pp:stages", {"pp": 4}, l=5, stages=(2, 0, 3, 0))] == [2, 0, 3, 0]


def test_tensor_parallel_first_then_sharded() -> None:
    """As FSDP2 cuts what tensor parallelism left: 50,257 rows on TP 2 and FSDP 4."""
    held = all_ranks("v/tp/dp:chunk", {"dp": 4, "tp": 2}, v=50258)
    assert [one.local[0] for one in held] == [6283] * 6 + [6280] * 2
    assert held[1].pieces[0].whole.offset == 25129


def test_heads_are_dealt() -> None:
    zero, one, two = split("(heads%tp d)", {"tp": 3}, heads=8, d=1)
    assert [zero.tolist(), one.tolist(), two.tolist()] == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_a_part_that_all_hold_has_no_axis() -> None:
    zero, one = all_ranks("(heads/tp d + 2 d)  h", {"tp": 2}, heads=4, d=3, h=2)
    assert [piece.axes for piece in zero.pieces] == [frozenset({"tp"}), frozenset()]
    assert zero.pieces[1] == one.pieces[1]


def test_padding_is_of_the_multiple_and_the_true_size_is_kept() -> None:
    zero, one = all_ranks("pad(v, 4*|tp|)/tp  h", {"tp": 2}, v=101, h=2)
    assert (zero.whole, zero.true, zero.local, one.local) == ((104, 2), (101, 2), (52, 2), (52, 2))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v/tp  h", "cannot be cut evenly"),
        ("v/tp:(51, 51)", "add up to 102"),
        ("v/dp", "axis 'dp'"),
        ("w", "size 'w' cannot be found"),
        ("v/tp:v", "add up to 101 in 1 shares"),
        ("v/tp:x", "a list of sizes"),
        ("(v 2)%tp", "plain size"),
        ("pad(v, 0)", "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, said: str) -> None:
    with pytest.raises(ProgramFault, match=said):
        all_ranks(text, {"tp": 2}, v=101, h=1)


SHAPES = ["a/x b", "(a b/x)", "(2 a/x) b/y", "(a/x 3 + b/x + c)", "a/x/y:balanced", "((a (b + 1) c)/x:balanced)", "(a%x b) c/y"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))
def test_every_element_is_held_once_at_random(text: str, x: int, y: int, a: int, b: int, c: int) -> None:
    axes = {axis: size for axis, size in (("x", x), ("y", y)) if f"/{axis}" in text or f"%{axis}" in text}
    held = all_ranks(text, axes, a=a * x * y, b=b * x * y, c=c * y)
    dense = np.arange(prod(held[0].whole)).reshape(held[0].whole)
    gathered(held, dense)
    distinct = list(dict.fromkeys(piece for one in held for piece in one.pieces if piece.count))
    by_place = {(piece.extents, piece.whole): piece for piece in distinct}
    assert prove_pieces(held[0].whole, list(by_place.values())).exact


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["a/x b", "(a b/x)", "(2 a/x) b", "a b/x:balanced", "((a b)/x:balanced)"]), st.data())
def test_transfers_between_two_layouts_make_the_target(text: str, data: st.DataObject) -> None:
    other = data.draw(st.sampled_from(["a/x b", "a b/x:balanced", "((a b)/x:balanced)", "a/x:balanced b"]))
    sizes = {"a": 12, "b": 24} if not text.startswith("(2") else {"a": 12, "b": 12}
    source = all_ranks(text, {"x": data.draw(st.sampled_from([1, 2, 3, 4]))}, **sizes)
    count = prod(source[0].whole)
    ways = data.draw(st.sampled_from([1, 2, 3, 4]))
    target = all_ranks(other, {"x": ways}, a=12, b=count // 12)
    given_ = [(one, piece) for one in source for piece in one.pieces]
    wanted = [(one, piece) for one in target for piece in one.pieces]
    have = gathered(source, np.arange(count).reshape(source[0].whole))
    made = [np.full(prod(one.local), -1) for one in target]
    for s, w, transfer in transfers(count, [p for _, p in given_], [p for _, p in wanted]):
        read = have[source.index(given_[s][0])].reshape(-1)[places(transfer.source, transfer.extents)]
        made[target.index(wanted[w][0])][places(transfer.target, transfer.extents)] = read
    flat = np.arange(count).reshape(target[0].whole)
    for one, expected in zip(made, gathered(target, flat), strict=True):
        assert one.tolist() == expected.reshape(-1).tolist()


def test_a_flat_range_of_a_divided_tensor() -> None:
    """Elements [3, 7) of a rank's own [4, 2] tensor, which is the second half of the columns of [4, 4]."""
    _, second = all_ranks("a  b/tp", {"tp": 2}, a=4, b=4)
    part = flat_part(second, 10, 3, 7)
    assert part.local == (14,)
    found = {
        int(place): int(whole)
        for piece in part.pieces
        for place, whole in zip(places(piece.local, piece.extents), places(piece.whole, piece.extents), strict=True)
    }
    assert found == {10: 7, 11: 10, 12: 11, 13: 14}


def test_rows_reordered_inside_each_head_are_one_piece() -> None:
    held = all_ranks("(heads/tp 2 r)  h", {"tp": 2}, heads=64, r=32, h=128)
    assert [len(one.pieces) for one in held] == [1, 1]
    assert isinstance(held[0].pieces[0], HeldPiece)
