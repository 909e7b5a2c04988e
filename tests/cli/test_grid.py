"""Aligned columns as values: what is broken, what is left out, and how wide things are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elastickpt.cli.grid import Column, Row, grid, plain
from elastickpt.cli.text import columns_of, nbytes_text, printable, ranges_text, time_text, value_text

COLUMNS = (Column("name"), Column("n", "right"), Column("words", flexible=True), Column("more", optional=1))
ROWS = [Row(("a", "1", "one two three four", "x"), "├── ", "│   "), Row(("long name", "1000", "", "yy"))]


def lines(width: int | None) -> list[str]:
    return [plain(line) for line in grid(COLUMNS, ROWS, width=width)]


def test_without_a_width_everything_is_on_one_line() -> None:
    assert lines(None) == [
        "name          n  words               more",
        "├── a         1  one two three four  x",
        "long name  1000                      yy",
    ]


def test_optional_columns_go_first_and_it_is_said() -> None:
    assert lines(36) == [
        "name          n  words",
        "├── a         1  one two three four",
        "long name  1000",
        "not shown on 36 columns: more (| less -S shows all)",
    ]


def test_then_flexible_columns_are_broken_at_blanks_beside_the_guides() -> None:
    assert lines(30)[:4] == [
        "name          n  words",
        "├── a         1  one two three",
        "│                four",
        "long name  1000",
    ]


def test_a_column_without_any_cell_is_left_out() -> None:
    found = [plain(line) for line in grid(COLUMNS, [Row(("a", "", "", ""))], width=None)]
    assert found == ["name", "a"]


def test_wide_characters_take_two_columns() -> None:
    rows = [Row(("名前", "1", "", "")), Row(("e\u0301", "22", "", ""))]
    assert [plain(line) for line in grid(COLUMNS, rows, width=None)][1:] == ["名前   1", "e\u0301     22"]


@given(st.text(max_size=20))
def test_printed_text_has_no_control_characters_and_plain_text_stays(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()
    assert columns_of(shown) >= 0


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_exactly_their_numbers(numbers: set[int]) -> None:
    found: set[int] = set()
    for part in filter(None, ranges_text(numbers).split(",")):
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    assert found == numbers


def test_sizes_have_one_decimal_and_binary_units() -> None:
    found = [nbytes_text(n) for n in (0, 1023, 1024, 1536, 1024**2 - 1, 5 << 30, 7 << 50)]
    assert found == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "5.0 GiB", "7.0 PiB"]


def test_times_beyond_the_calendar_are_numbers() -> None:
    assert time_text(0.0) == "1970-01-01 00:00:00 UTC"
    assert time_text(1e300) == "1e+300 s after 1970"


def test_long_values_are_cut_and_say_so() -> None:
    assert value_text("x" * 1000).endswith("x'… (1,000 characters)")
    assert value_text(list(range(100))).endswith("15, … 84 more]")
    assert value_text({"a": (1,), "b": {2}}) == "{'a': (1,), 'b': {2}}"
    assert value_text(10**5000) == "an integer of 16,610 bits"
