"""Keys are safe paths, differ where case is ignored, and depend on the set of names only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.errors import LimitExceeded, StructureConflict, Unsafe
from elastickpt.format.arrays import ArrayId
from elastickpt.format.keys import (
    array_keys,
    checked_name,
    checked_names,
    checked_path,
    checked_paths,
    child_keys,
    chunk_file,
    encode_name,
)

_names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40) | st.sampled_from(
    [
        "",
        ".",
        "..",
        "zarr.json",
        "ZARR.JSON",
        "__pycache__",
        "W",
        "w",
        "x" * 300,
        "X" * 300,
        "é" * 90,
        "a" * 179 + "é" * 20,
    ]
)


@given(st.sets(_names, max_size=8))
def test_keys_of_siblings_differ_where_case_is_ignored(names: set[str]) -> None:
    keys = child_keys(names)
    assert set(keys) == names
    assert len({key.lower() for key in keys.values()}) == len(names)
    for key in keys.values():
        assert checked_path(key) == key
        assert "/" not in key
        assert len(key) <= 200
        assert not key.startswith("__")
        assert key.lower() != "zarr.json"


@given(st.lists(_names, max_size=8, unique=True), st.integers())
def test_keys_do_not_depend_on_order(names: list[str], seed: int) -> None:
    shuffled = random.Random(seed).sample(names, len(names))
    assert child_keys(names) == child_keys(shuffled)


@given(_names, _names)
def test_plain_keys_are_injective(one: str, other: str) -> None:
    if one != other:
        assert encode_name(one) != encode_name(other)


_ids = st.builds(ArrayId, st.just("params"), _names, _names, _names.filter(bool)) | st.builds(
    ArrayId, st.just("extra"), _names, _names.map(lambda name: name.replace("/", "~1").replace("~", "~0")), st.just("")
)


@given(st.sets(_ids, max_size=8))
def test_every_array_has_a_path_of_its_own(ids: set[ArrayId]) -> None:
    try:
        keys = array_keys(ids)
    except StructureConflict:
        heads = {(array.item, array.name == "") for array in ids if array.section == "extra"}
        assert any((item, not whole) in heads for item, whole in heads)
        return
    assert set(keys) == ids
    assert len({key.lower() for key in keys.values()}) == len(ids)
    for array, key in keys.items():
        assert checked_path(key) == key
        assert key.startswith(f"{array.section}/")


def test_an_array_of_another_section_does_not_change_a_key() -> None:
    lower = ArrayId("params", "m", "w", "value")
    assert array_keys([lower, ArrayId("extra", "m", "W", "")])[lower] == "params/m/w/value"
    assert array_keys([lower, ArrayId("params", "M", "W", "value")])[lower].endswith("/w/value")


@pytest.mark.parametrize(
    "path", ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a\\b", "C:/a", "s3://a", "a\0", "a\n", "ä", "a\x7f"]
)
def test_unsafe_paths_are_refused(path: str) -> None:
    """[UCF-38]"""
    with pytest.raises(Unsafe):
        checked_path(path)


@pytest.mark.parametrize("path", ["a" * 256, "a/" * 2048 + "a"])
def test_long_paths_are_refused(path: str) -> None:
    """[UCF-39]"""
    with pytest.raises(LimitExceeded):
        checked_path(path)


def test_the_longest_component_is_a_file_name() -> None:
    assert checked_path("a" * 255) == "a" * 255
    assert chunk_file("params/m/w/value", ()) == "params/m/w/value/c"


@pytest.mark.parametrize("name", ["a\nb", "\x00", "\x7f", "\ud800"])
def test_names_with_control_characters_or_broken_text_are_refused(name: str) -> None:
    """[UCF-30]"""
    with pytest.raises(Unsafe):
        encode_name(name)


_rough = st.text(st.sampled_from("a./\\:\n\x7fé "), max_size=6)


@given(st.lists(_rough, max_size=4))
def test_many_names_and_paths_are_refused_as_one_by_one(names: list[str]) -> None:
    """[UCF-30, UCF-38]"""
    for one, many in ((checked_path, checked_paths), (checked_name, checked_names)):
        try:
            expected = [one(name) for name in names]
        except (Unsafe, LimitExceeded) as error:
            with pytest.raises(type(error)):
                many(names)
        else:
            assert list(many(names)) == expected


@pytest.mark.parametrize(
    ("many", "longest"), [(checked_paths, "a" * 255), (checked_paths, "/".join(["a" * 255] * 16)), (checked_names, "a" * 1024)]
)
def test_what_is_too_long_is_found_among_many(many: Callable[[Sequence[str]], Sequence[str]], longest: str) -> None:
    """[UCF-30, UCF-39]"""
    assert list(many(["b", longest])) == ["b", longest]
    with pytest.raises(LimitExceeded):
        many(["b", longest + "a"])
