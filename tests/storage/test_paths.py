from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.errors import Unsafe
from elastickpt.storage.store import ancestors_of, checked, checked_directory, parent_of

components = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.sampled_from(["", ".", "..", "...", "\0"])


@given(st.lists(components, min_size=1, max_size=4))
def test_a_path_is_safe_when_each_of_its_components_is(parts):
    path = "/".join(parts)
    safe = all(part not in ("", ".", "..") and "\0" not in part for part in path.split("/"))
    if safe:
        assert checked(path) == path
    else:
        with pytest.raises(Unsafe):
            checked(path)


def test_the_root_is_a_directory_and_no_file():
    assert checked_directory("") == ""
    with pytest.raises(Unsafe):
        checked("")


def test_a_newline_at_the_end_does_not_hide_what_stands_before_it():
    assert checked("a\n") == "a\n"
    with pytest.raises(Unsafe):
        checked("a/\n/..")


def test_ancestors_go_from_the_outermost_to_the_path_itself():
    assert ancestors_of("a/b/c") == ("a", "a/b", "a/b/c")
    assert (parent_of("a/b/c"), parent_of("a")) == ("a/b", "")
