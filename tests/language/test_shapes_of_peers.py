"""What other libraries' layouts need, at plan level: heads dealt and in blocks, shares padded each, flat tensors, stacks.

Vectors V2, V3, V7, V9, V11 of peers' own tests, beside those of `test_vectors.py`. DeepSpeed's 11 pieces of codegen are the
runs of rows of a rank; its 40 (4 ranks to 8) count how its planner merges, and are not built. V9 does not say along which
axes its second tensor is cut: here the first and the last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import CheckpointError, ProgramFault
from elastickpt.language.held import Strides, transfers
from elastickpt.language.holders import LocalShape, RankShapes
from elastickpt.language.matching import match
from elastickpt.language.parse import parse
from elastickpt.language.placing import PlacedTensor, place
from elastickpt.language.renaming import NamedShape, equations, fitting, left_out, link
from elastickpt.language.rules import Rules, declared, resolve
from tests.language.test_held_pieces import all_ranks, gathered, places
from tests.language.test_rules import GPT, SIZES, cut, merged, ranks_of, whole
from tests.language.test_vectors import moved


def rules(text: str, sizes: Mapping[str, int], **constants: int) -> Rules:
    return resolve(parse(f"ucl 1\n{text}", name="my.ucl"), constants, sizes)


def there_and_back(
    text: str, dense: dict[str, np.ndarray], sizes: dict[str, int], **constants: int
) -> tuple[PlacedTensor, ...]:
    """Every rank's tensors of dense arrays; what they hold, put together again, is those arrays."""
    known = rules(text, sizes, **constants)
    tensors = place(known, [NamedShape(name, one.shape) for name, one in dense.items()])
    axes = {axis: known.scope.axes[axis] for axis in known.axes}
    again = merged(match(known, ranks_of(tensors, axes)), tensors, dense, axes)
    assert again.keys() == dense.keys()
    for name, one in dense.items():
        assert np.array_equal(again[name], one), name
    return tensors


def runs(source: np.ndarray, target: np.ndarray) -> int:
    """How many stretches go, where both sides continue."""
    order = np.argsort(target, kind="stable")
    steps = (np.diff(source[order]) == 1) & (np.diff(target[order]) == 1)
    return 1 + int(np.count_nonzero(~steps))


# -- V2, V3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chosen", "count", "shares"), [("lowest", 7, (640, 128)), ("half", 6, (384, 384))])
def test_v2_segments_by_who_is_asked_for_copies(chosen: str, count: int, shares: tuple[int, int]) -> None:
    """bigcode 48 x 8 from 2 ranks to 4: copies come from the lowest holder, or from rank target // 2."""
    one, other = (all_ranks("(q/tp + 16)  h", {"tp": tp}, q=32, h=8) for tp in (2, 4))
    found, sent = 0, [0, 0]
    for target, held in enumerate(other):
        parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for piece in held.pieces:
            for source, have in enumerate(one):
                asked = not piece.axes and source != (0 if chosen == "lowest" else target // 2)
                if asked:
                    continue
                own = [p for p in have.pieces if p.axes == piece.axes]
                for _, _, segment in transfers(384, own, [piece]):
                    at, to = (places(side, segment.extents) for side in (segment.source, segment.target))
                    parts.setdefault(source, []).append((at, to))
                    sent[source] += segment.count
        for some in parts.values():
            found += runs(*(np.concatenate([part[k] for part in some]) for k in (0, 1)))
    assert (found, tuple(sent)) == (count, shares)


def test_v3b_dealt_heads_are_one_lattice() -> None:
    """yuan, (8, 64), 8 heads of 8 on 4 ranks: from head to head 32 elements, inside a head 1."""
    for rank, held in enumerate(all_ranks("a  (heads%tp d)", {"tp": 4}, a=8, heads=8, d=8)):
        (piece,) = held.pieces
        assert (piece.extents, piece.whole) == ((8, 2, 8), Strides(8 * rank, (64, 32, 1)))


def test_v3_dealt_heads_from_two_ranks_to_four_are_four_segments() -> None:
    found = moved(*(all_ranks("a  (heads%tp d)", {"tp": tp}, a=8, heads=8, d=8) for tp in (2, 4)))
    assert len(found) == 4
    assert [(source, target) for source, target, *_ in found] == [(rank % 2, rank) for rank in range(4)]


CODEGEN = """\
mesh m = tp
let s = |tp|
in model
    qkv  ((4 s)/tp 3 n)  h
"""
BLOCKS = "ucl 1\nneeds s\nqkv  (4 s 3 n) h  ->  whole.qkv  (4 3 s n) h\n"


def codegen(tp: int, hidden: int) -> list[np.ndarray]:
    """For each rank: the rows of the fused weight as Hugging Face has it, in the order in which the rank has them.

    Four blocks of query, value and key rows; every part is cut `tp` ways, and a rank has blocks of sub-blocks, end to end.
    """
    n = hidden // (4 * tp)
    known = rules(CODEGEN, {"tp": tp}, n=n)
    scope = declared(parse(BLOCKS), {"s": tp})
    lines = fitting(equations(parse(BLOCKS), scope), ["qkv"])
    (one,) = link(lines, [NamedShape("qkv", (3 * hidden, 1))], scope.with_sizes({"n": n}))
    order = np.empty(3 * hidden, dtype=int)
    order[places(one.at, one.extents)] = places(one.to, one.extents)
    tensors = place(resolve(known.program, {}, {"tp": tp}), [NamedShape("qkv", (3 * hidden, 1))])
    return [order[cut(tensor, {"qkv": np.arange(3 * hidden).reshape(-1, 1)}).reshape(-1)] for tensor in tensors]


@pytest.mark.parametrize("hidden", [8, 16, 64, 256])
def test_v3_codegen_has_eleven_runs_of_rows_at_any_size(hidden: int) -> None:
    for rows in codegen(2, hidden):
        assert runs(rows, np.arange(len(rows))) == 11
    whole = np.sort(np.concatenate(codegen(2, hidden)))
    assert whole.tolist() == list(range(3 * hidden))


def test_v3_codegen_rows_are_those_that_autotp_makes() -> None:
    """By hand: every part of every block in sub-blocks, these side by side, then ranks' equal shares."""
    hidden, tp = 32, 2
    blocks = np.arange(3 * hidden).reshape(4, 3, tp, -1)  # block, part, sub-block, rows
    wanted = blocks.transpose(0, 2, 1, 3).reshape(tp, -1)
    assert [rows.tolist() for rows in codegen(tp, hidden)] == wanted.tolist()


def test_v3_codegen_from_four_ranks_to_eight() -> None:
    one, other = codegen(4, 64), codegen(8, 64)
    where = {int(row): (rank, k) for rank, rows in enumerate(one) for k, row in enumerate(rows)}
    taken = [{where[int(row)][0] for row in rows} for rows in other]
    assert taken == [{rank // 2} for rank in range(8)]  # each new rank takes from one old rank


# -- V7, V9, V11 -------------------------------------------------------------------------------------------------------


def test_v7_new_data_parallel_ranks_share_the_old_stages() -> None:
    """2 x 2 x 2 to 1 x 2 x 2: rank (tp, dp) takes old ranks of stage dp. Old ranks are numbered dp, pp, tp."""
    old = np.arange(8).reshape(2, 2, 2)
    flat = np.array([old[d, p, k] for p, k, d in product(range(2), range(2), range(2))])
    held = all_ranks("(a/dp b/tp c)", {"dp": 2, "tp": 2}, a=2, b=2, c=2)
    assert [local.reshape(-1).tolist() for local in gathered(held, flat)] == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(("text", "shape"), [("a/tp  b/pp", (2, 4)), ("x/pp  5  z/tp", (4, 5, 80))])
def test_v9_another_partition(text: str, shape: tuple[int, ...]) -> None:
    """2 x 4 ranks to 1 x 2."""
    index = np.indices(shape)
    dense = 100 * index[0] + index[-1]
    sizes = dict(zip("abxz", (2, 4, 4, 80), strict=True))
    source, target = (all_ranks(text, {"tp": tp, "pp": pp}, **sizes) for tp, pp in ((2, 4), (1, 2)))
    have = gathered(source, dense)
    made = [np.full(prod(one.local), -1) for one in target]
    for s, w, extents, at, to in moved(source, target):
        made[w][places(to, extents)] = have[s].reshape(-1)[places(at, extents)]
    for one, wanted in zip(made, gathered(target, dense), strict=True):
        assert one.tolist() == wanted.reshape(-1).tolist()


@pytest.mark.parametrize(("axes", "order"), [("edp, ep", [0, 2, 1, 3]), ("ep, edp", [0, 1, 2, 3])])
def test_v11_whose_replica_a_rank_is_depends_on_the_order_of_the_axes(axes: str, order: list[int]) -> None:
    """E+D and D+E: ranks in the order of the mesh, listed expert by expert. Two ranks call different experts `experts.0`."""
    text = f"needs experts\nmesh m = {axes}\nin model\n    experts.{{e: experts/ep}}.w  h  same edp\n"
    known = rules(text, {"ep": 2, "edp": 2}, experts=2)
    dense = {f"experts.{e}.w": np.arange(3) + 10 * e for e in range(2)}
    tensors = place(known, [NamedShape(name, one.shape) for name, one in dense.items()])
    assert [one.name for one in tensors] == ["experts.0.w"] * 4
    holds = [one.parts[0].array for one in tensors]
    assert sorted(range(4), key=lambda rank: (holds[rank], rank)) == order
    matched = match(known, ranks_of(tensors, dict.fromkeys(known.axes, 2)))
    assert {one.name: sorted(holder.rank for holder in one.holders) for one in matched.arrays} == {
        "experts.0.w": order[:2],
        "experts.1.w": order[2:],
    }


@pytest.mark.parametrize("etp", [1, 2, 4])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_experts_beside_dense_layers_on_a_mesh_of_their_own(ep: int, etp: int) -> None:
    """Sixteen ranks: dense layers over pp, dp, tp, experts over pp, edp, ep, etp. Fused, stacked, and one by one."""
    text = """\
needs experts, layers
mesh dense = pp, dp, tp
mesh sparse = pp, edp, ep, etp
on dense
in model
    l.{i: layers/pp}.qkv  (3 h/tp)  h  same dp
on sparse
in model
    l.{i: layers/pp}.fused    as l.{i}.experts.{e}.up    ((e=experts/ep) f/etp)  h      same edp
    l.{i: layers/pp}.stacked  as l.{i}.experts.{e}.glu   (e=experts/ep)  h  (2 g/etp)   same edp
    l.{i: layers/pp}.local.{e: experts/ep}.down as l.{i}.experts.{e}.down  h  f/etp     same edp
"""
    if ep * etp > 8:
        with pytest.raises(ProgramFault, match="mesh 'sparse' has 32 places, the first one 16"):
            rules(text, {"pp": 2, "dp": 4, "tp": 2, "edp": 1, "ep": ep, "etp": etp}, experts=4, layers=2)
        return
    sizes = {"pp": 2, "dp": 4, "tp": 2, "edp": 8 // (ep * etp), "ep": ep, "etp": etp}
    count, dense = 0, {}
    shapes = {"qkv": (12, 4)}
    shapes |= {f"experts.{e}.{n}": s for e in range(4) for n, s in {"up": (8, 4), "glu": (4, 24), "down": (4, 8)}.items()}
    for i, (name, shape) in product(range(2), shapes.items()):
        dense[f"l.{i}.{name}"] = np.arange(count, count + prod(shape)).reshape(shape)
        count += prod(shape)
    known = rules(text, sizes, experts=4, layers=2)
    tensors = place(known, [NamedShape(name, one.shape) for name, one in dense.items()])
    ranks = {axis: sizes[axis] for axis in known.rank_axes}
    again = merged(match(known, ranks_of(tensors, ranks)), tensors, dense, ranks)
    for name, one in dense.items():
        assert np.array_equal(again[name], one), name
    last = [one for one in tensors if dict(one.coordinate) == {"pp": 1, "dp": 3, "tp": 1}]  # of all ranks
    held = {one.name: cut(one, dense) for one in last}
    experts = 4 // ep
    assert held["l.0.fused"].shape == (experts * 8 // etp, 4)
    assert np.array_equal(held["l.0.fused"][-8 // etp :], dense["l.1.experts.3.up"][-8 // etp :])
    assert {name for name in held if "local" in name} == {f"l.0.local.{e}.down" for e in range(experts)}


# -- what else the language has to express -----------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", [":balanced", ":chunk"])
def test_shares_that_are_padded_by_themselves(tp: int, mode: str) -> None:
    """Cut, pad, lay: 101 rows, each rank's filled up to a multiple of 8; in the whole padding stands behind the true rows."""
    held = all_ranks(f"pad(v/tp{mode}, 8)  h", {"tp": tp}, v=101, h=2)
    assert {(one.whole, one.true) for one in held} == {((sum(one.local[0] for one in held), 2), (101, 2))}
    assert all(one.local[0] % 8 == 0 for one in held)
    dense = np.arange(prod(held[0].whole)).reshape(held[0].whole)
    locals_ = gathered(held, dense)
    share = -(-101 // tp)
    assert locals_[0][: min(share, 101)].reshape(-1).tolist() == list(range(2 * min(share, 101)))
    assert sorted(np.concatenate([one.reshape(-1) for one in locals_]).tolist()) == list(range(dense.size))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_query_key_value_side_by_side_with_more_ranks_than_key_heads(tp: int) -> None:
    """[Q; K; V]: every rank has its query heads and the key and value head that they share."""
    text = """\
needs heads, groups, d
mesh m = tp
split tp = kv, copy where |kv| = min(|tp|, groups)
in model
    qkv  (heads/tp d + groups/kv d + groups/kv d)  h   same copy
"""
    dense = {"qkv": np.arange((8 + 2 + 2) * 3 * 2).reshape(36, 2)}
    tensors = there_and_back(text, dense, {"tp": tp}, heads=8, groups=2, d=3)
    for rank, one in enumerate(tensors):
        local = cut(one, dense)
        heads, keys = 8 // tp, max(2 // tp, 1)
        first = rank * 2 // tp if tp > 2 else rank * keys
        assert np.array_equal(local[: 3 * heads], dense["qkv"][3 * heads * rank : 3 * heads * (rank + 1)])
        assert np.array_equal(local[3 * heads : 3 * (heads + keys)], dense["qkv"][24 + 3 * first :][: 3 * keys])


def test_layers_that_a_file_stacks_become_one_array_each_with_global_numbers() -> None:
    text = "needs layers\nmesh m = pp, tp\nin model\n    fc1 as layers.{l}.fc1  (l=layers/pp)  (2 f/tp)  h\n"
    dense = {f"layers.{k}.fc1": np.arange(24).reshape(12, 2) + 100 * k for k in range(6)}
    tensors = there_and_back(text, dense, {"pp": 3, "tp": 2}, layers=6)
    assert [one.shape for one in tensors] == [(2, 6, 2)] * 6
    assert [part.array for part in tensors[2].parts] == ["layers.2.fc1", "layers.3.fc1"]


def test_heads_are_dealt_by_a_rule() -> None:
    dense = {"w": np.arange(4 * 24).reshape(4, 24)}
    there_and_back("needs heads\nmesh m = tp\nin model\n    w  a  (heads%tp 4)\n", dense, {"tp": 3}, heads=6)


def test_axes_of_sequence_and_context_only_repeat() -> None:
    text = "mesh m = cp, sp, tp\nin model\n    w  o/tp  h  same cp, sp\n    norm  h  same cp, sp, tp\n"
    dense = {"w": np.arange(24).reshape(8, 3), "norm": np.arange(3)}
    tensors = there_and_back(text, dense, {"cp": 2, "sp": 3, "tp": 2})
    assert len([one for one in tensors if one.name == "w"]) == 12


def test_a_map_casts_and_drops() -> None:
    text = "ucl 1\na.{i}.w  ->  b.{i}.w  cast bfloat16\nc.{i}.w  h f -> d.{i}.w  f h  cast float16\n{*n}.mask  drop\n"
    found = parse(text)
    lines = fitting(equations(found, declared(found, {})), ["a.0.w", "c.0.w", "x.mask"])
    shapes = [NamedShape("a.0.w", (2, 2)), NamedShape("c.0.w", (2, 3)), NamedShape("x.mask", (9,))]
    links = link(lines, shapes, declared(found, {}))
    assert [(one.source, one.target, one.cast) for one in links] == [
        ("a.0.w", "b.0.w", "bfloat16"),
        ("c.0.w", "d.0.w", "float16"),
    ]
    assert left_out(lines, [one.name for one in shapes]) == ("x.mask",)
    back = fitting(equations(found, declared(found, {})), ["b.0.w", "d.0.w", "x.mask"])
    assert left_out(back, ["b.0.w", "x.mask"]) == ("x.mask",)


# -- flat tensors by rules ---------------------------------------------------------------------------------------------

SHAPES = {"a": (7, 3), "b": (5,), "c": (2, 2, 2), "d": (1,), "e": ()}
FORMS = ["pad(cat(o), 2*|dp|)/dp", "cat(o, pad |dp|)/dp", "cat(o)/dp:chunk", "cat(o)/dp:balanced"]


def flat_ranks(tensors: tuple[PlacedTensor, ...], dp: int, shapes: Mapping[str, tuple[int, ...]] | None) -> list[RankShapes]:
    found = []
    for rank in range(dp):
        mine = [one for one in tensors if dict(one.coordinate)["dp"] == rank]
        local = tuple(LocalShape(one.container, one.name, one.shape) for one in mine)
        found.append(RankShapes({"dp": rank}, local, listings={"files": tuple(shapes.items())} if shapes else {}))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dp", [1, 2, 3, 5])
@pytest.mark.parametrize("by", ["listing", "clause"])
def test_flat_tensors_by_a_listing_of_the_files_or_an_order_that_is_written_out(form: str, dp: int, by: str) -> None:
    dims = {name: "  ".join(map(str, shape)) or "(0)" for name, shape in SHAPES.items()}
    order = (
        "order o = listing files\n" if by == "listing" else "order o:\n" + "".join(f"    {k}  {v}\n" for k, v in dims.items())
    )
    known = rules(f"mesh m = dp\n{order}in model\n    flat  {form}\n", {"dp": dp})
    count, dense = 0, {}
    for name, shape in SHAPES.items():
        dense[name] = np.arange(count, count + prod(shape)).reshape(shape)
        count += prod(shape)
    arrays = [NamedShape(name, shape) for name, shape in SHAPES.items()]
    tensors = place(known, arrays, listings={"files": tuple(SHAPES.items())})
    assert [one.name for one in tensors] == ["flat"] * dp
    again = merged(match(known, flat_ranks(tensors, dp, SHAPES)), tensors, dense, {"dp": dp})
    assert again.keys() == dense.keys()
    for name, one in dense.items():
        assert np.array_equal(again[name], one), name


def test_a_flat_tensor_of_what_tensor_parallelism_left() -> None:
    """ZeRO over TP: a rank's flat tensor has its own shares; the rules of the names say how they lie in the whole."""
    text = """\
needs layers
mesh m = pp, dp, tp
order o = listing files
in model
    flat  pad(cat(o), |dp|)/dp  same pp, tp
in shapes
    l.{i: layers/pp}.up    8/tp  3  same dp  optional
    l.{i: layers/pp}.norm  3        same dp, tp  optional
"""
    text = text.replace("same pp, tp", "any pp, tp")
    known = rules(text, {"pp": 2, "dp": 2, "tp": 2}, layers=2)
    listing = (("l.0.up", (4, 3)), ("l.0.norm", (3,)))
    ranks = [
        RankShapes(
            dict(zip(("pp", "dp", "tp"), at, strict=True)), (LocalShape("model", "flat", (8,)),), listings={"files": listing}
        )
        for at in product(range(2), range(2), range(2))
    ]
    arrays = {one.name: one for one in match(known, ranks).arrays}
    assert {name: one.shape for name, one in arrays.items()} == {
        f"l.{i}.{name}": shape for i in range(2) for name, shape in {"up": (8, 3), "norm": (3,)}.items()
    }
    assert {holder.at["pp"] for holder in arrays["l.1.up"].holders} == {1}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5),
    st.integers(1, 4),
    st.sampled_from(FORMS),
)
def test_random_flat_tensors_hold_all_of_their_arrays(shapes: list[tuple[int, ...]], dp: int, form: str) -> None:
    named = {f"t{k}": shape for k, shape in enumerate(shapes)}
    known = rules(f"mesh m = dp\norder o = listing files\nin model\n    flat  {form}\n", {"dp": dp})
    dense = {name: np.arange(prod(shape)).reshape(shape) + 1000 * k for k, (name, shape) in enumerate(named.items())}
    tensors = place(known, [NamedShape(n, s) for n, s in named.items()], listings={"files": tuple(named.items())})
    again = merged(match(known, flat_ranks(tensors, dp, named)), tensors, dense, {"dp": dp})
    for name, one in again.items():
        assert np.array_equal(one, dense[name]), name
    assert again.keys() >= {name for name, shape in named.items() if prod(shape)}


# -- programs at random ------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(st.integers(0, len(GPT)), st.integers(0, 8), st.text(alphabet="ab(){}|/%=+,:. 0239*pdthgs\n", max_size=5), st.booleans())
def test_any_change_of_a_program_lays_ranks_out_or_is_a_typed_error(at: int, gone: int, put: str, read: bool) -> None:
    sizes = {"pp": 2, "tp": 2}
    dense = [NamedShape(name, one.shape) for name, one in whole(**sizes).items()]
    with contextlib.suppress(CheckpointError):
        found = parse(GPT[:at] + put + GPT[at + gone :])
        known = resolve(found, SIZES, dict.fromkeys(("pp", "tp"), 2))
        if read:
            match(known, ranks_of(place(rules_of_gpt(), dense), sizes))
        else:
            place(known, dense)


def rules_of_gpt() -> Rules:
    return resolve(parse(GPT), SIZES, {"pp": 2, "tp": 2})
