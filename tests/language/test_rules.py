"""Programs against what ranks hold: what fits, what is refused and where, both ways. [LANG-10..18, LANG-25, LANG-26]"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import ProgramFault
from elastickpt.language.holders import LocalShape, RankShapes
from elastickpt.language.matching import Matched, match
from elastickpt.language.orders import counted
from elastickpt.language.parse import parse
from elastickpt.language.placing import PlacedTensor, place
from elastickpt.language.renaming import NamedShape
from elastickpt.language.rules import Rules, resolve
from tests.language.test_held_pieces import places

GPT = """\
ucl 1
needs layers, heads, groups, d, vocab
let q = heads/groups
mesh dense = pp, tp
in model
    embed            pad(vocab, 4*|tp|)/tp  h      first pp
    layers.{i: layers/pp}.
        norm         h                             same tp
        qkv          (groups/tp (q + 1 + 1) d)  h
        proj         h  (heads/tp d)
        fc1          (2 f/tp)  h
        bias         h                             same tp  optional
        {*n}.extra   drop  optional
    head             pad(vocab, 4*|tp|)/tp  h      last pp
"""
SIZES = {"layers": 4, "heads": 4, "groups": 2, "d": 2, "vocab": 13}
H, F = 6, 8


def rules(text: str, sizes: Mapping[str, int], **constants: int) -> Rules:
    return resolve(parse(text, name="my.ucl"), constants, sizes)


def whole(pp: int = 1, tp: int = 1) -> dict[str, np.ndarray]:
    """The dense arrays, every element another number; padded as that mesh has it."""
    rows = -(-13 // (4 * tp)) * 4 * tp
    shapes: dict[str, tuple[int, ...]] = {"embed": (rows, H), "head": (rows, H)}
    for i in range(4):
        more = {"norm": (H,), "qkv": (2 * 4 * 2, H), "proj": (H, 8), "fc1": (2 * F, H)}
        shapes.update({f"layers.{i}.{name}": shape for name, shape in more.items()})
    first, found = 0, {}
    for name in sorted(shapes):
        count = prod(shapes[name])
        found[name] = np.arange(first, first + count).reshape(shapes[name])
        first += count
    return found


def named(dense: Mapping[str, np.ndarray]) -> list[NamedShape]:
    padded = {"embed", "head"}
    return [NamedShape(name, one.shape, (13, H) if name in padded else None) for name, one in dense.items()]


def cut(placed: PlacedTensor, dense: Mapping[str, np.ndarray]) -> np.ndarray:
    made = np.zeros(prod(placed.shape), dtype=np.int64)
    for part in placed.parts:
        for piece in part.held.pieces:
            made[places(piece.local, piece.extents)] = dense[part.array].reshape(-1)[places(piece.whole, piece.extents)]
    return made.reshape(placed.shape)


def ranks_of(tensors: tuple[PlacedTensor, ...], sizes: Mapping[str, int]) -> list[RankShapes]:
    found = []
    for index in product(*map(range, sizes.values())):
        at = dict(zip(sizes, index, strict=True))
        mine = [one for one in tensors if dict(one.coordinate) == at]
        found.append(RankShapes(at, tuple(LocalShape(one.container, one.name, one.shape, one.chunk) for one in mine), str(at)))
    return found


def merged(matched: Matched, tensors: tuple[PlacedTensor, ...], dense: Mapping[str, np.ndarray], sizes: Mapping[str, int]):
    """The wholes, put together again from the local tensors."""
    by_rank = [
        [one for one in tensors if dict(one.coordinate) == dict(zip(sizes, index, strict=True))]
        for index in product(*map(range, sizes.values()))
    ]
    found = {}
    for array in matched.arrays:
        made = np.full(prod(array.shape), -1)
        for holder in array.holders:
            local = cut(by_rank[holder.rank][holder.tensor], dense).reshape(-1)
            for piece in holder.held.pieces:
                made[places(piece.whole, piece.extents)] = local[places(piece.local, piece.extents)]
        found[array.name] = made.reshape(array.shape)
    return found


@pytest.mark.parametrize("sizes", [{"pp": 1, "tp": 1}, {"pp": 2, "tp": 2}, {"pp": 4, "tp": 2}, {"pp": 1, "tp": 2}])
def test_a_program_read_both_ways_is_one(sizes: dict[str, int]) -> None:
    known = rules(GPT, sizes, **SIZES)
    dense = whole(**sizes)
    tensors = place(known, named(dense))
    matched = match(known, ranks_of(tensors, sizes))
    again = merged(matched, tensors, dense, sizes)
    assert again.keys() == dense.keys()
    for name, one in dense.items():
        assert np.array_equal(again[name], one), name
    assert dict(matched.sizes) == {"h": H, "f": F}
    assert {one.name: one.true for one in matched.arrays}["embed"] == (13, H)


def test_tensors_stand_in_the_order_of_the_program() -> None:
    tensors = place(rules(GPT, {"pp": 2, "tp": 1}, **SIZES), named(whole()))
    first = [one.name for one in tensors if dict(one.coordinate)["pp"] == 0]
    inside = ["norm", "qkv", "proj", "fc1"]
    assert first == ["embed", *(f"layers.{i}.{name}" for i in range(2) for name in inside)]


def fitting(sizes: dict[str, int], text: str = GPT) -> tuple[Rules, list[RankShapes]]:
    known = rules(text, sizes, **SIZES)
    return known, ranks_of(place(known, named(whole(**sizes))), sizes)


def changed(ranks: list[RankShapes], rank: int, change) -> list[RankShapes]:
    one = ranks[rank]
    tensors = tuple(new for tensor in one.tensors for new in change(tensor))
    return [*ranks[:rank], RankShapes(one.coordinate, tensors, one.where), *ranks[rank + 1 :]]


def refused(known: Rules, ranks: list[RankShapes]) -> str:
    with pytest.raises(ProgramFault) as caught:
        match(known, ranks)
    return caught.value.message


def test_a_name_that_no_rule_has_is_refused() -> None:
    known, ranks = fitting({"pp": 1, "tp": 2})
    said = refused(
        known, changed(ranks, 1, lambda one: [one, LocalShape("model", "strange", (3,))] if one.name == "head" else [one])
    )
    assert "tensor 'strange' of 'model', shape (3,)" in said
    assert "no rule" in said


def test_a_name_that_several_rules_have_is_refused_at_the_second() -> None:
    known, ranks = fitting({"pp": 1, "tp": 1})
    double = rules(GPT + "    {*any}  ...  same pp, tp  optional\n", {"pp": 1, "tp": 1}, **SIZES)
    said = refused(double, ranks)
    assert said.startswith("my.ucl:15:5: ")
    assert "several rules match it" in said
    assert said.splitlines()[-1].strip() == "^" * len("{*any}")
    assert known.rules


def test_a_rule_that_matches_nothing_is_refused_unless_optional() -> None:
    _, ranks = fitting({"pp": 1, "tp": 1})
    said = refused(rules(GPT.replace("same tp  optional", "same tp"), {"pp": 1, "tp": 1}, **SIZES), ranks)
    assert said.startswith("my.ucl:12:9: no tensor has such a name")


def test_a_rank_that_lacks_a_tensor_is_named() -> None:
    known, ranks = fitting({"pp": 2, "tp": 2})
    said = refused(known, changed(ranks, 3, lambda one: [] if one.name == "layers.0.norm" else [one]))
    assert "array 'layers.2.norm': the rank at pp=1, tp=1 lacks its tensor" in said


def test_a_tensor_where_only_other_ranks_have_it_is_refused() -> None:
    known, ranks = fitting({"pp": 2, "tp": 1})
    said = refused(
        known, changed(ranks, 1, lambda one: [one, LocalShape("model", "embed", (16, H))] if one.name == "head" else [one])
    )
    assert "its rule says that other ranks only have it" in said


def test_a_shape_that_is_not_the_programs_is_refused_with_both() -> None:
    known, ranks = fitting({"pp": 1, "tp": 2})
    grown = changed(ranks, 0, lambda one: [LocalShape("model", one.name, (7, 6)) if one.name == "layers.1.qkv" else one])
    said = refused(known, grown)
    assert "expected shape (8, 6) by the program, found (7, 6)" in said
    assert "qkv          (groups/tp" in said


def test_a_number_beyond_a_ranks_share_is_refused() -> None:
    known, ranks = fitting({"pp": 2, "tp": 1})
    beyond = changed(ranks, 0, lambda one: [LocalShape("model", one.name.replace("layers.1.", "layers.5."), one.shape)])
    assert "number 5 in a name" in refused(known, beyond)


@pytest.mark.parametrize(
    ("text", "sizes", "constants", "said"),
    [
        ("needs a\nmesh m =", {}, {}, "my.ucl:2:7: constant 'a' is in no file: give --set a=N"),
        ("needs a, a\nmesh m =", {}, {"a": 1}, "my.ucl:2:10: constant 'a' is given twice"),
        ("let a = b", {}, {}, "my.ucl:2:9: constant 'b' is not given"),
        ("needs a\nlet b = a/2", {}, {"a": 3}, "my.ucl:3:9: 3 / 2: expected a division without remainder"),
        ("mesh m = pp, pp", {}, {}, "mesh 'm' stands twice, or has an axis twice"),
        ("mesh m = pp", {"tp": 2}, {}, "my.ucl:2:6: mesh axis 'tp': expected one of pp"),
        ("mesh m = pp", {"pp": 0}, {}, "of size 0"),
        ("mesh m = tp\nsplit tp = a, b where |c| = 2", {"tp": 4}, {}, "expected one of a and b"),
        ("mesh m = tp\nsplit tp = a, b where |a| = 3", {"tp": 4}, {}, "is no multiple of 3"),
        ("mesh m = tp\nsplit dp = a, b where |a| = 1", {}, {}, "axis 'dp'"),
        ("mesh m = tp\nchunks tp = 2", {}, {}, "axis 'tp' stands twice"),
        ("mesh m = tp\nchunks v = 0", {}, {}, "axis 'v' of size 0"),
        ("mesh m = tp\non n", {}, {}, "my.ucl:3:4: mesh 'n': expected one of m"),
        ("mesh m = tp\norder o = all\norder o = all", {}, {}, "order 'o' stands twice"),
        ("mesh m = tp, dp\nin x\n    a  h/tp", {}, {}, "my.ucl:4:5: axis 'dp' is not mentioned"),
        ("mesh m = tp\nin x\n    a  (b/tp + c)", {}, {}, "axis 'tp' is not mentioned"),
        ("mesh m = tp\nin x\n    a  h  same dp", {}, {}, "my.ucl:4:11: axis 'dp'"),
        ("mesh m = tp\nin x\n    a  h/tp  (b + c/tp)", {}, {}, "axis 'tp' cuts it twice"),
        ("mesh m = tp\nin x\n    a{i: l/tp}  h/tp", {}, {}, "axis 'tp' cuts it twice"),
        ("mesh m = tp\nin x\n    a.\n", {}, {}, "expected dimensions"),
        ("mesh m = tp\nin x\n    a  h\n        b  h", {}, {}, "a block has no dimensions"),
        ("mesh m = tp\nin x\n    a as b.{e}  h  same tp", {}, {}, "{e} is neither a hole"),
        ("mesh m = tp\na h -> b h", {}, {}, "a map stands in a program"),
        ("mesh m = tp\nin x\n    a  h -> b h", {}, {}, "a map stands in a program"),
    ],
)
def test_what_a_program_says_of_itself_that_is_wrong(text: str, sizes, constants, said: str) -> None:
    with pytest.raises(ProgramFault) as caught:
        rules(f"ucl 1\n{text}\n", sizes, **constants)
    assert said in caught.value.message


# -- stacks, experts, splits, chunks, orders ---------------------------------------------------------------------------

EXPERTS = """\
ucl 1
needs experts
mesh {order}
in model
    fused      as experts.{{e}}.w   ((e=experts/ep) out/etp)  in       same edp
    stacked    as experts.{{e}}.v   (e=experts/ep)  h  (2 f/etp)       same edp
    one.{{e: experts/ep}}.u        (2 f/etp)  h                        same edp
"""


@pytest.mark.parametrize("order", ["mesh = edp, ep, etp", "mesh = ep, edp, etp"])
@pytest.mark.parametrize("sizes", [{"edp": 2, "ep": 2, "etp": 2}, {"edp": 1, "ep": 4, "etp": 1}, {"edp": 1, "ep": 1, "etp": 4}])
def test_experts_fused_stacked_and_one_by_one(order: str, sizes: dict[str, int]) -> None:
    """E+D and D+E: the order of the axes says who is whose replica."""
    known = rules(EXPERTS.format(order=order), sizes, experts=4)
    dense = {}
    for e in range(4):
        dense[f"experts.{e}.w"] = np.arange(8 * 3).reshape(8, 3) + 100 * e
        dense[f"experts.{e}.v"] = np.arange(3 * 8).reshape(3, 8) + 1000 + 100 * e
        dense[f"one.{e}.u"] = np.arange(8 * 3).reshape(8, 3) + 2000 + 100 * e
    axes = {axis: sizes[axis] for axis in known.axes}
    tensors = place(known, [NamedShape(name, one.shape) for name, one in dense.items()])
    again = merged(match(known, ranks_of(tensors, axes)), tensors, dense, axes)
    for name, one in dense.items():
        assert np.array_equal(again[name], one), name
    fused = next(one for one in tensors if one.name == "fused")
    local = cut(fused, dense)
    assert local.shape == (4 // sizes["ep"] * (8 // sizes["etp"]), 3)
    assert np.array_equal(local[: 8 // sizes["etp"]], dense["experts.0.w"][: 8 // sizes["etp"]])


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ProgramFault, match="cannot be cut evenly 3 ways"):
        place(rules(EXPERTS.format(order="mesh = edp, ep, etp"), {"ep": 3}, experts=8), [NamedShape("one.0.u", (8, 3))])


def test_more_ranks_than_key_heads_hold_copies_of_them() -> None:
    text = """\
ucl 1
needs groups, heads
let q = heads/groups
mesh m = tp
split tp = kv, copy where |kv| = min(|tp|, groups)
in model
    qkv  (groups/kv (q/copy + 1 + 1) d)  h   same copy
"""
    known = rules(text, {"tp": 4}, groups=2, heads=8)
    dense = {"qkv": np.arange(2 * 6 * 3 * 2).reshape(36, 2)}
    tensors = place(known, [NamedShape("qkv", (36, 2))])
    matched = match(known, ranks_of(tensors, {"tp": 4}))
    assert np.array_equal(merged(matched, tensors, dense, {"tp": 4})["qkv"], dense["qkv"])
    assert [one.shape for one in tensors] == [(12, 2)] * 4  # two query heads, a key, a value
    keys = [cut(one, dense)[6:9] for one in tensors]
    assert np.array_equal(keys[0], keys[1])
    assert not np.array_equal(keys[0], keys[2])


@pytest.mark.parametrize(("stages", "locals_"), [((3, 0, 1, 1), [3, 0, 1, 1]), ((0, 5, 0, 0), [0, 5, 0, 0])])
def test_uneven_and_empty_stages(stages: tuple[int, ...], locals_: list[int]) -> None:
    text = "ucl 1\nneeds layers, stages\nmesh m = pp\nin model\n    layers.{i: layers/pp:stages}.w  h\n"
    known = resolve(parse(text), {"layers": 5, "stages": stages}, {"pp": 4})
    tensors = place(known, [NamedShape(f"layers.{i}.w", (2,)) for i in range(5)])
    assert [sum(dict(one.coordinate)["pp"] == pp for one in tensors) for pp in range(4)] == locals_
    assert [one.parts[0].array for one in tensors] == [f"layers.{i}.w" for i in range(5)]
    assert {one.name for one in match(known, ranks_of(tensors, {"pp": 4})).arrays} == {f"layers.{i}.w" for i in range(5)}


def test_virtual_stages_are_dealt_in_rounds() -> None:
    """Eight layers, two ranks with two chunks each: rank 0 has layers 0, 1 and 4, 5."""
    text = "ucl 1\nneeds layers\nmesh m = pp\nchunks v = 2\nin model\n    layers.{i: layers/v/pp}.w  h\n"
    known = rules(text, {"pp": 2}, layers=8)
    tensors = place(known, [NamedShape(f"layers.{i}.w", (2,)) for i in range(8)])
    held = {(dict(one.coordinate)["pp"], one.chunk, one.name): one.parts[0].array for one in tensors}
    assert held[0, 1, "layers.0.w"] == "layers.4.w"
    assert held[1, 0, "layers.1.w"] == "layers.3.w"
    matched = match(known, ranks_of(tensors, {"pp": 2}))
    assert {one.name: dict(one.holders[0].at)["v"] for one in matched.arrays}["layers.7.w"] == 1


def test_a_tied_name_is_the_same_array_once_more() -> None:
    text = "ucl 1\nmesh m = pp\nin model\n    embed  v h  first pp\n    head  v h  last pp  tied embed\n"
    known = rules(text, {"pp": 2})
    tensors = place(known, [NamedShape("embed", (4, 2))])
    assert [(dict(one.coordinate)["pp"], one.name) for one in tensors] == [(0, "embed"), (1, "head")]
    matched = match(known, ranks_of(tensors, {"pp": 2}))
    assert dict(matched.tied) == {("model", "head"): "embed"}
    assert [len(one.holders) for one in matched.arrays] == [2]


def test_orders_count_by_kinds_and_by_names() -> None:
    text = "ucl 1\nmesh m =\norder o = matrices, vectors\norder p:\n    b\n    a\norder l = listing files\n"
    known = rules(text, {})
    values = [LocalShape("model", name, shape) for name, shape in (("a", (2,)), ("b", (2, 2)), ("c", ()), ("d", (1, 1, 1)))]
    assert counted(known.orders["o"], known, values, {}) == ("b", "d", "a", "c")
    assert counted(known.orders["p"], known, values, {}) == ("b", "a")
    assert counted(known.orders["l"], known, values, {"files": ("c", "a")}) == ("c", "a")
    with pytest.raises(ProgramFault, match="listing 'files'"):
        counted(known.orders["l"], known, values, {})
    with pytest.raises(ProgramFault, match="names 'a', which is no tensor"):
        counted(known.orders["p"], known, values[1:], {})


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["", ":chunk", ":balanced"]))
def test_random_meshes_both_ways(pp: int, tp: int, dp: int, mode: str) -> None:
    text = f"""\
ucl 1
needs layers
mesh m = pp, dp, tp
in model
    l.{{i: layers/pp{mode}}}.a    x/dp:chunk  (y + z/tp)       same tp
    l.{{i: layers/pp{mode}}}.b    (2 x/tp) y                   same dp
    top                        x/(dp tp):balanced           last pp
"""
    layers = 6 if not mode else 7
    known = rules(text, {"pp": pp, "tp": tp, "dp": dp}, layers=layers)
    x, y, z = 6 * tp, 3, 2 * tp
    dense: dict[str, np.ndarray] = {"top": np.arange(x)}
    for i in range(layers):
        dense[f"l.{i}.b"] = np.arange(2 * x * y).reshape(2 * x, y)
    shapes = [NamedShape(name, one.shape) for name, one in dense.items()]
    shapes += [NamedShape(f"l.{i}.a", (x, y + z)) for i in range(layers)]
    dense.update({f"l.{i}.a": np.arange(x * (y + z)).reshape(x, y + z) for i in range(layers)})
    known = resolve(parse(text), {"layers": layers, "z": z}, {"pp": pp, "tp": tp, "dp": dp})
    axes = {axis: known.scope.axes[axis] for axis in known.axes}
    known = rules(text.replace("needs layers", "needs layers, z"), axes, layers=layers, z=z)
    tensors = place(known, shapes)
    again = merged(match(known, ranks_of(tensors, axes)), tensors, dense, axes)
    for name, one in dense.items():
        assert np.array_equal(again[name], one), name
