"""Every refusal of the language has line, column and a caret below what is wrong. [LANG-3, LANG-19, LANG-27]"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from elastickpt.errors import ProgramFault
from elastickpt.language.holders import LocalShape, RankShapes
from elastickpt.language.matching import match
from elastickpt.language.orders import counted
from elastickpt.language.parse import parse
from elastickpt.language.placing import place
from elastickpt.language.renaming import NamedShape, equations, fitting, link
from elastickpt.language.rules import declared, resolve

Shapes = Mapping[tuple[int, ...], list[tuple[object, ...]]]


def refusal(act: Callable[[], object]) -> tuple[str, str]:
    """(message, what the caret stands below)."""
    with pytest.raises(ProgramFault) as caught:
        act()
    first, *rest = caught.value.message.splitlines()
    assert first.startswith("my.ucl:"), first
    line, column = map(int, first.split(":")[1:3])
    text, caret = rest[-2:]
    assert caret.strip("^ ") == ""
    assert caret.index("^") == 3 + column
    assert line >= 1
    return first, text[caret.index("^") : caret.rindex("^") + 1]


def program(text: str):
    return parse(f"ucl 1\n{text}\n", name="my.ucl")


@pytest.mark.parametrize(
    ("text", "said", "below"),
    [
        ("needs a b", "found 'b', expected one of", "b"),
        ("let a = (1 + ", "expected one of", ""),
        ("needs s = (1, ", "expected one of", ""),
        ("let a = most(1, 2)", "function most of 2: expected one of", "most"),
        ("in m\n    x{i}{i}  a", "a hole stands twice", "x{i}{i}"),
        ("in m\n    x{i: /}  a", "expected a share", "{i: /}"),
        ("in m\n    x{*i: a}  a", "expected {i}, {i: share} or {*text}", "{*i: a}"),
        ("in m\n    x  pad(v%tp, 4)", "expected pad(size)", "v"),
        ("in m\n      x  h\n   y  h", "the indentation fits no block above", " "),
    ],
)
def test_texts(text: str, said: str, below: str) -> None:
    message, marked = refusal(lambda: program(text))
    assert said in message
    assert not below or marked == below


@pytest.mark.parametrize(
    ("text", "sizes", "said", "below"),
    [
        ("needs a", {}, "constant 'a' is in no file", "a"),
        ("needs k, k", {}, "given twice", "k"),
        ("let a = b", {}, "constant 'b' is not given", "b"),
        ("needs k\nlet a = k/2", {}, "3 / 2: expected a division without remainder", "k"),
        ("needs k\nlet a = ceil(k, 0)", {}, "expected a divisor of at least 1", "ceil"),
        ("let a = |dp|", {}, "axis 'dp': expected one of the mesh (none)", "dp"),
        ("mesh m = pp\nmesh m = tp", {}, "mesh 'm' stands twice", "m"),
        ("mesh m = pp", {"tp": 2}, "mesh axis 'tp': expected one of pp", "m"),
        ("mesh m = pp", {"pp": 0}, "of size 0", "m"),
        ("mesh m = tp\nsplit tp = a, b where |c| = 2", {}, "expected one of a and b", "tp"),
        ("mesh m = tp\nsplit tp = a, b where |a| = 3", {"tp": 4}, "is no multiple of 3", "tp"),
        ("mesh m = tp\nchunks tp = 2", {}, "axis 'tp' stands twice", "tp"),
        ("mesh m = tp\nchunks v = 0", {}, "axis 'v' of size 0", "v"),
        ("mesh m = tp\non n", {}, "mesh 'n': expected one of m", "n"),
        ("order o = all\norder o = all", {}, "order 'o' stands twice", "o"),
        ("mesh m = tp\nin x\n    a  h", {}, "axis 'tp' is not mentioned", "a"),
        ("mesh m = tp\nin x\n    a  (b/tp + c)", {}, "axis 'tp' is not mentioned", "a"),
        ("mesh m = tp\nin x\n    a  h  same dp", {}, "axis 'dp'", "same"),
        ("mesh m = tp\nin x\n    a  h/tp  b/tp", {}, "axis 'tp' cuts it twice", "a"),
        ("in x\n    a", {}, "expected dimensions", "a"),
        ("in x\n    a  h\n        b  h", {}, "a block has no dimensions", "a"),
        ("in x\n    a as b.{e}  h", {}, "{e} is neither a hole", "{e}"),
        ("in x\n    l.{i}.\n        w as l.{i}.v  h", {}, "a hole stands twice: inside a block", "l.{i}.v"),
        ("a h -> b h", {}, "a map stands in a program", "a"),
        ("in x\n    a  h -> b h", {}, "a map stands in a program", "a"),
    ],
)
def test_programs_by_themselves(text: str, sizes: dict[str, int], said: str, below: str) -> None:
    message, marked = refusal(lambda: resolve(program(text), {"k": 3}, sizes))
    assert said in message
    assert marked == below


MESH = "mesh m = pp, tp\n"


@pytest.mark.parametrize(
    ("text", "ranks", "said", "below"),
    [
        ("in x\n    a  h  same pp, tp", {(0, 0): [("b", (2,))]}, "no rule matches it; expected one here", "x"),
        ("in y\n    a  h  same pp, tp", {(0, 0): [("a", (2,))]}, "no rule matches it; expected one here", "y"),
        (
            "in x\n    a  h  same pp, tp\n    {*n}  ...  same pp, tp  optional",
            {(0, 0): [("a", (2,))]},
            "several rules match it, of lines 4, 5",
            "{*n}",
        ),
        ("in x\n    a  h  same tp  last pp", {(0, 0): [("a", (2,))], (1, 0): []}, "its rule says that other ranks only", "a"),
        ("in x\n    a  h  same pp, tp\n    b  h  same pp, tp", {(0, 0): [("a", (2,))]}, "no tensor has such a name", "b"),
        ("in x\n    a  4  same pp, tp", {(0, 0): [("a", (2,))]}, "expected shape (4,) by the program, found (2,)", "a"),
        ("in x\n    a  pad(v, 4)  same pp, tp", {(0, 0): [("a", (8,))]}, "the size 'v' cannot be found", "v"),
        ("in x\n    a  v/tp  same pp", {(0, 0): [("a", (2,))], (0, 1): [("a", (1,))]}, "cannot be cut evenly", "tp"),
        ("in x\n    a  4/tp:(1, 2)  same pp", {(0, 0): [("a", (1,))], (0, 1): [("a", (2,))]}, "add up to 3 in 2 shares", "tp"),
        ("in x\n    a  4/tp:list  same pp", {(0, 0): [("a", (2,))]}, "expected a constant that is a list", "tp"),
        (
            "needs s = (1, 2, 2)\nin x\n    a  5/tp:s  same pp",
            {(0, 0): [("a", (2,))], (0, 1): [("a", (3,))]},
            "5 cannot be cut evenly 2 ways here: give --set s=N,N,..., a size for each share",
            "tp",
        ),
        (
            "needs s = found\nin x\n    l.{i: 4/pp:s}  h  same tp",
            {(0, 0): [("l.0", (2,))], (1, 0): [("l.0", (2,))]},
            "sizes (1, 1) add up to 2 in 2 shares: expected 4 in 2",
            "{i: 4/pp:s}",
        ),
        ("in x\n    a  (2 3)%tp  same pp", {(0, 0): [("a", (6,))]}, "only a plain size can be dealt", "tp"),
        ("in x\n    a  pad(k, 0)  same pp, tp", {(0, 0): [("a", (3,))]}, "pad to a multiple of 0", "k"),
        ("in x\n    a  cat(o)  4  same pp, tp", {(0, 0): [("a", (4, 4))]}, "cat(...) can stand alone or inside pad only", "o"),
        ("in x\n    a  pad(cat(o), 2)  4  same pp, tp", {(0, 0): [("a", (4, 4))]}, "cat(...) can stand alone only", "o"),
        ("in x\n    l.{i: 4/pp}  h  same tp", {(0, 0): [("l.4", (2,))]}, "number 4 in a name", "{i: 4/pp}"),
        ("in x\n    a  h  same pp, tp", {(0, 0): [("a", (2,)), ("a", (2,))]}, "holds it twice", "a"),
        ("in x\n    a  h  same pp, tp", {(0, 0): [("a", (2,))], (0, 1): []}, "the rank at pp=0, tp=1 lacks its tensor", "a"),
        ("in x\n    a  h  same pp, tp", {(0, 0): [("a", (2,), 1)]}, "of chunk 1: expected 1 by the program", "x"),
        (
            "chunks v = 2\nin x\n    a  h  same pp, tp, v",
            {(0, 0): [("a", (2,), 0), ("a", (2,), 1)]},
            "held by several chunks",
            "a",
        ),
        (
            "in x\n    a  h  same pp, tp\n    b as a  h  same pp, tp",
            {(0, 0): [("a", (2,)), ("b", (2,))]},
            "made by several rules, of lines [4, 5]",
            "b",
        ),
        (
            "in x\n    a  h  same pp, tp\n    b as a  w  same pp, tp  tied a",
            {(0, 0): [("a", (2,)), ("b", (3,))]},
            "shape (2,) by line 4, (3,) by this line",
            "b",
        ),
    ],
)
def test_programs_against_what_ranks_hold(text: str, ranks: Shapes, said: str, below: str) -> None:
    sizes = {"pp": 1 + max(at[0] for at in ranks), "tp": 1 + max(at[1] for at in ranks)}

    def act() -> object:
        shapes = [
            RankShapes({"pp": at[0], "tp": at[1]}, tuple(LocalShape("x", *one) for one in some), f"rank {at}")  # type: ignore[arg-type]
            for at, some in ranks.items()
        ]
        return match(resolve(program(MESH + text), {"k": 3}, sizes), shapes)

    message, marked = refusal(act)
    assert said in message
    assert marked == below


@pytest.mark.parametrize(
    ("order", "said", "below"),
    [
        ("o:\n    a\n    a", "order 'o' has the name 'a' twice", "a"),
        ("o:\n    group b", "order 'o' names 'b', which is no tensor there", "b"),
        ("o = listing l", "listing 'l': expected one that the files hold (none)", "o"),
        ('"o" = listing l', "listing 'l': expected one that the files hold (none)", '"o"'),
    ],
)
def test_orders(order: str, said: str, below: str) -> None:
    known = resolve(program(f"mesh m =\norder {order}"), {}, {})
    message, marked = refusal(lambda: counted(known.orders["o"], known, [LocalShape("x", "a", (2,))], {}))
    assert said in message
    assert marked == below


FLAT = "mesh m = dp\norder o = listing files\norder p:\n    a  2 3\n    b\norder q = all\nin x\n    flat  "


@pytest.mark.parametrize(
    ("dims", "shape", "said", "below"),
    [
        ("cat(z)/dp", (3,), "order 'z': expected one of o, p, q", "z"),
        ("cat(q)/dp", (3,), "order 'q' counts kinds", "q"),
        ("cat(o)/dp", (3,), "listing 'files': expected one that the files hold (none)", "o"),
        ("cat(p)/dp", (3,), "'b': no rule states its shape", "b"),
    ],
)
def test_flat_tensors(dims: str, shape: tuple[int, ...], said: str, below: str) -> None:
    ranks = [RankShapes({"dp": k}, (LocalShape("x", "flat", shape),)) for k in range(2)]
    message, marked = refusal(lambda: match(resolve(program(FLAT + dims), {}, {"dp": 2}), ranks))
    assert said in message
    assert marked == below


@pytest.mark.parametrize(
    ("dims", "listing", "shape", "said", "below"),
    [
        ("cat(o)/dp", {"a": (3,), "w": (4,)}, (3,), "7 elements cannot be cut evenly 2 ways", "dp"),
        ("cat(o)/dp:(3, 4)", {"a": (3,), "w": (4,)}, (3,), "cut evenly, by chunk or balanced", "dp"),
        ("pad(cat(o), 0)/dp", {"a": (3,), "w": (4,)}, (3,), "pad to a multiple of 0", "dp"),
        (
            "cat(o, pad 2)/dp",
            {"a": (3,), "w": (4,)},
            (5,),
            "expected 4 elements of order 'o' by the program, found shape (5,)",
            "flat",
        ),
        ("cat(o)/dp", {"a": (3,), "w": (3,)}, (3,), "'w': expected shape (5,) by the program, found (3,)", "w"),
    ],
)
def test_flat_tensors_by_a_listing(dims, listing, shape, said: str, below: str) -> None:
    text = f"mesh m = dp\norder o = listing files\nin x\n    flat  {dims}\n    w  5  same dp  optional"
    if "'w'" not in said:
        text = text.replace("w  5", "v  5")
    ranks = [
        RankShapes({"dp": k}, (LocalShape("x", "flat", shape),), listings={"files": tuple(listing.items())}) for k in range(2)
    ]
    message, marked = refusal(lambda: match(resolve(program(text), {}, {"dp": 2}), ranks))
    assert said in message
    assert marked == below


def test_a_flat_tensor_that_a_rank_lacks_and_parts_that_nobody_holds() -> None:
    text = "mesh m = dp\norder o:\n    a  4\nin x\n    flat  cat(o)/dp"
    one = RankShapes({"dp": 0}, (LocalShape("x", "flat", (2,)),))
    message, marked = refusal(lambda: match(resolve(program(text), {}, {"dp": 2}), [one, RankShapes({"dp": 1}, ())]))
    assert "the rank at dp=1 lacks its tensor" in message
    assert marked == "flat"
    text = "mesh m = dp\norder o:\n    a  4/dp\nin x\n    flat  cat(o)  first dp"
    message, marked = refusal(lambda: match(resolve(program(text), {}, {"dp": 2}), [one, RankShapes({"dp": 1}, ())]))
    assert "array 'a' of shape (4,): nobody holds" in message
    assert marked == "flat"
    text = "mesh m = dp\norder o:\n    a  2\n    a  2\nin x\n    flat  cat(o)/dp"
    both = [RankShapes({"dp": k}, (LocalShape("x", "flat", (2,)),)) for k in range(2)]
    assert match(resolve(program(text), {}, {"dp": 2}), both).arrays[0].shape == (2,)  # the same array twice is one


@pytest.mark.parametrize(
    ("text", "arrays", "said", "below"),
    [
        ("in x\n    a  h/tp", [("b", (2,))], "array 'b', shape (2,): no rule has it; expected one here", "x"),
        ("in x\n    a  h/tp\n    c as a  h  same tp", [("a", (2,))], "several rules have it, of lines 4, 5", "c"),
        ("in x\n    a  h/tp\n    b  h/tp", [("a", (2,))], "no array has such a name", "b"),
        ("in x\n    a  4/tp", [("a", (2,))], "expected shape (4,) by the program, found (2,)", "a"),
        ("in x\n    a as e.{n}  (n=4/tp) 2", [("e.0", (2,))], "8 elements, the arrays give", "a"),
        (
            "order o:\n    a  2\nin x\n    f{i}  cat(o)/tp",
            [("a", (2,))],
            "a flat tensor that is to be made has a plain name",
            "f{i}",
        ),
    ],
)
def test_programs_for_what_is_to_be_made(text: str, arrays, said: str, below: str) -> None:
    rules = resolve(program("mesh m = tp\n" + text), {}, {"tp": 2})
    message, marked = refusal(lambda: place(rules, [NamedShape(name, shape) for name, shape in arrays]))
    assert said in message or "4 elements, the arrays give" in message
    assert marked == below


@pytest.mark.parametrize(
    ("text", "arrays", "said", "below"),
    [
        ("a -> b\nc -> d", {"e": (2,)}, "no line of the map has 'e', shape (2,)", "c"),
        ("a  h -> b  f", {"a": (2,)}, "the size 'f' cannot be found", "f"),
        ("a  h f -> b  f h", {"a": (2,)}, "2 dimensions in the map, shape (2,)", "a"),
        ("a  h -> b", {"a": (2,)}, "expected dimensions on both sides", "a"),
        ("a  (k + k) -> b  k k", {"a": (6,)}, "a sum of which no part is chosen", "k"),
        ("a  k/tp -> b  k", {"a": (3,)}, "a map has no axes, and no cat", "tp"),
        ("a  cat(o) -> b  k", {"a": (3,)}, "a map has no axes, and no cat", "o"),
        ("a  h", {"a": (2,)}, "expected a map", "a"),
        ("a  (A=h + B=h)\n    C -> c  h", {"a": (2,)}, "expected 'LABEL -> name  dims'", "C"),
        ("a  (k k) -> b  (k k)", {"a": (8,)}, "expected shape (9,) by the map, found (8,)", "a"),
        ("a  l h -> b  h", {"a": (2, 2)}, "l: stands on one side of the arrow only", "a"),
    ],
)
def test_name_maps(text: str, arrays, said: str, below: str) -> None:
    def act() -> object:
        found = program("let k = 3\n" + text)
        scope = declared(found, {})
        lines = fitting(equations(found, scope), list(arrays))
        return link(lines, [NamedShape(name, shape) for name, shape in arrays.items()], scope)

    message, marked = refusal(act)
    assert said in message
    assert marked == below
