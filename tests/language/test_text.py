"""Text and tree of the language, and what a wrong text is told. [LANG-1, LANG-2, LANG-3]"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import CheckpointError, LimitExceeded, ProgramFault
from elastickpt.language.parse import parse
from elastickpt.language.printer import print_program

EVERYTHING = """\
# a comment
ucl 1
needs layers, heads, groups = heads, virtual = 1   # another
needs out or also or third, width or breadth = 3
let q = heads/groups
let odd = (heads + 1)*2 - 3%2
mesh dense = pp, tp 4
mesh none =
split tp = kv, copy where |kv| = min(|tp|, groups)
chunks v = virtual
on dense
order optimizer = matrices, vectors
order listed = listing param_shapes
order given:
    a.b
    group c
    group
order "other.0" = all
in model or other{k}
    embedding.weight                pad(vocab, divisor*|tp|)/tp  h   first pp
    decoder.layers.{i: layers/v/pp}.
        norm.weight                 h                                same tp
        qkv.weight                  (groups/tp (q + 1 + 1) d)  h     optional  equal
        deep.
            w                       a/tp:(51, 50)  b/tp:chunk  c/(pp tp):balanced  e%tp  l/pp:stages
        {*n}._extra_state           drop  optional
    experts                         ((e=experts/tp) (2 f))  h        as experts.{e}
    flat                            pad(cat(listed), 2*|tp|)/tp
    each                            cat(listed, pad |tp|)/tp
    scaled                          h                                same tp  stored /|tp| (exp_avg: -1)
    head                            ...                              tied embedding.weight  if heads != 3
    scalar                          (0)                              any tp  average pp
    "in"                            h                                same pp, tp
a  (groups (Q=q + K=1) d) h
    Q -> q.{i}    (groups q d) h
b  l h f -> c.{l}.q   h f  cast bfloat16
"""


def test_a_tree_survives_its_text() -> None:
    program = parse(EVERYTHING.replace("  as experts.{e}", "").replace("    experts   ", "    experts as experts.{e}   "))
    assert parse(print_program(program)) == program
    assert print_program(parse(print_program(program))) == print_program(program)


@pytest.mark.parametrize(
    ("text", "line", "column", "word"),
    [
        ("ucl 1\nneeds a b\n", 2, 9, "expected"),
        ("ucl 1\nin m\n    x  h  same\n", 3, 15, "a name"),
        ("ucl 1\nin m\n    x  (a + )\n", 3, 13, "expected"),
        ("ucl 1\nin m\n    x{i: /}  a\n", 3, 6, "share"),
        ("ucl 1\nin m\n    x{i}{i}  a\n", 3, 5, "twice"),
        ("ucl 2\n", 1, 5, "version 2"),
        ("ucl 1\nlet a = most(1, 2)\n", 2, 9, "min of 2"),
        ("", 1, 1, "end of the text"),
    ],
)
def test_a_wrong_text_is_told_with_line_column_and_caret(text: str, line: int, column: int, word: str) -> None:
    with pytest.raises(ProgramFault) as caught:
        parse(text, name="my.ucl")
    first, *rest = caught.value.message.splitlines()
    assert first.startswith(f"my.ucl:{line}:{column}: ")
    assert word in caught.value.message
    assert rest[-1].startswith("    " + " " * (column - 1) + "^")


def test_indentation_that_fits_no_block_is_told() -> None:
    with pytest.raises(ProgramFault, match="indentation"):
        parse("ucl 1\nin m\n      x  h\n   y  h\n")


def test_deep_and_long_texts_are_refused() -> None:
    with pytest.raises(LimitExceeded, match="parentheses"):
        parse("ucl 1\nin m\n    x  " + "(" * 5000 + "\n")
    with pytest.raises(LimitExceeded, match="characters"):
        parse("ucl 1\n" + "#" * (1 << 20))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_a_text_is_a_program_or_a_typed_error(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(EVERYTHING)))
    cut = data.draw(st.integers(0, 12))
    put = data.draw(st.text(alphabet='ab(){}|/%=+,:.\n\t 09"*#inpad', max_size=6))
    try:
        program = parse(EVERYTHING[:at] + put + EVERYTHING[at + cut :])
    except CheckpointError:
        return
    assert parse(print_program(program)) == program
