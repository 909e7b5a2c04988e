"""Name maps: split, join, stack, unstack, transposed, reordered, cast; and what is refused. [LANG-30..32]"""

from __future__ import annotations

import numpy as np
import pytest

from elastickpt.errors import ProgramFault
from elastickpt.language.parse import parse
from elastickpt.language.renaming import Link, NamedShape, equations, fitting, link
from elastickpt.language.rules import declared
from elastickpt.language.shelf import config_text, name_maps, names_text, program_text, programs, purpose
from tests.language.test_held_pieces import places


def links(text: str, shapes: dict[str, tuple[int, ...]], **constants: int) -> tuple[Link, ...]:
    program = parse(f"ucl 1\n{text}", name="map.ucl")
    scope = declared(program, constants)
    lines = fitting(equations(program, scope), list(shapes))
    return link(lines, [NamedShape(name, shape) for name, shape in shapes.items()], scope)


def applied(text: str, arrays: dict[str, np.ndarray], **constants: int) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for one in links(text, {name: array.shape for name, array in arrays.items()}, **constants):
        into = made.setdefault(one.target, np.full(one.shape, -1)).reshape(-1)
        into[places(one.to, one.extents)] = arrays[one.source].reshape(-1)[places(one.at, one.extents)]
    return made


def numbered(*shape: int) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape)


def there_and_back(text: str, arrays: dict[str, np.ndarray], **constants: int) -> dict[str, np.ndarray]:
    made = applied(text, arrays, **constants)
    again = applied(text, made, **constants)
    assert again.keys() == arrays.keys()
    for name, one in arrays.items():
        assert np.array_equal(again[name], one), name
    return made


def test_a_fused_array_is_split_by_groups_and_joined() -> None:
    text = """\
needs g, d
a{i}  (g (Q=q + K=1 + V=1) d) h
    Q -> q{i}  (g q d) h
    K -> k{i}  (g d) h
    V -> v{i}  (g d) h
"""
    fused = numbered(2 * 4 * 3, 5)
    made = there_and_back(text, {"a7": fused}, g=2, d=3)
    blocks = fused.reshape(2, 4, 3, 5)
    assert np.array_equal(made["q7"], blocks[:, :2].reshape(12, 5))
    assert np.array_equal(made["k7"], blocks[:, 2].reshape(6, 5))
    assert np.array_equal(made["v7"], blocks[:, 3].reshape(6, 5))


def test_halves_and_pairs_are_one_lattice() -> None:
    text = "needs heads, r\na  (heads 2 r) h -> b  (heads r 2) h\n"
    made = there_and_back(text, {"a": numbered(12, 2)}, heads=2, r=3)
    assert np.array_equal(made["b"], numbered(12, 2).reshape(2, 2, 3, 2).transpose(0, 2, 1, 3).reshape(12, 2))
    assert len(links(text, {"a": (4096, 64)}, heads=64, r=32)) == 1


def test_transposed_stacked_and_unstacked() -> None:
    assert np.array_equal(there_and_back("a  x y -> b  y x\n", {"a": numbered(2, 3)})["b"], numbered(2, 3).T)
    made = there_and_back("all.w  l h f -> layers.{l}.w  h f\n", {"all.w": numbered(4, 2, 3)})
    assert np.array_equal(made["layers.2.w"], numbered(4, 2, 3)[2])
    assert sorted(made) == [f"layers.{k}.w" for k in range(4)]


def test_a_padded_array_goes_through_with_its_true_rows() -> None:
    program = parse("ucl 1\na  pad(v) h -> b  v h\n")
    scope = declared(program, {})
    (one,) = link(fitting(equations(program, scope), ["a"]), [NamedShape("a", (8, 2), (5, 2))], scope)
    assert (one.shape, one.extents) == ((5, 2), (5, 2))


@pytest.mark.parametrize(
    ("text", "shapes", "said"),
    [
        ("a -> b\n", {"c": (2,)}, "no line of the map has 'c', shape (2,)"),
        ("a  h -> b  f\n", {"a": (2,)}, "map.ucl:2:12: the size 'f' cannot be found"),
        ("a  h f -> b  f h\n", {"a": (2,)}, "2 dimensions in the map, shape (2,)"),
        ("a  h -> b\n", {"a": (2,)}, "expected dimensions on both sides"),
        ("a  (k + k) -> b  k k\n", {"a": (6,)}, "a sum of which no part is chosen"),
        ("a  h/tp -> b  h\n", {"a": (2,)}, "axis 'tp': expected one of the mesh (none)"),
        ("a  h\n", {"a": (2,)}, "expected a map"),
        ("a  (A=h + B=h)\n    C -> c  h\n", {"a": (2,)}, "expected 'LABEL -> name  dims' with one of A, B"),
        ("needs k\na  (k k) -> b  (k k)\n", {"a": (8,)}, "expected shape (9,) by the map, found (8,)"),
        ("a  (x y) -> b  (y x)\n", {"a": (8,)}, "cannot be found: give --set"),
    ],
)
def test_maps_that_do_not_fit(text: str, shapes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(ProgramFault) as caught:
        links(text, shapes, k=3)
    assert said in caught.value.message


def test_everything_shipped_is_a_text_of_the_language() -> None:
    assert {parse(program_text(name)).version for name in programs()} == {1}
    assert {parse(names_text(name)).version for name in name_maps()} == {1}
    assert all(len(purpose(name)) > 20 for name in name_maps())
    assert config_text("llama-hf") is not None
    assert config_text("llama-titan") is None
