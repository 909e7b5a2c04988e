"""Rules of retention in words: one way to write them, and what is written reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.errors import Refused
from elastickpt.ledger.retention import Best, Keep, keep_of, words_of

COUNTS = st.none() | st.integers(1, 10**20)
METRICS = st.text(st.characters(codec="utf-8")) | st.text(",%:=25C minax", max_size=12)  # what the words are made of too
BEST = st.builds(Best, METRICS, st.integers(1, 10**20), st.sampled_from(["min", "max"]))
SECONDS = st.none() | st.floats(min_value=0, exclude_min=True) | st.integers(1, 10**6)
KEEPS = st.builds(Keep, COUNTS, COUNTS, st.none() | BEST, SECONDS, COUNTS)


@given(KEEPS)
def test_rules_read_back(keep: Keep) -> None:
    """[RUN-65]"""
    assert keep_of(words_of(keep)) == keep
    assert words_of(keep_of(words_of(keep))) == words_of(keep)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (Keep(), "all"),
        (Keep(last=3, every=1000, best=Best("loss", 2)), "last=3,every=1000,best=loss:2:min"),
        (
            Keep(best=Best("a,b:c%", mode="max"), max_age_s=60, max_nbytes=10),
            "best=a%2Cb:c%25:1:max,max_age_s=60.0,max_nbytes=10",
        ),
    ],
)
def test_rules_are_written_in_one_way(keep: Keep, words: str) -> None:
    assert words_of(keep) == words


@pytest.mark.parametrize(
    ("words", "keep"),
    [
        ("best=loss", Keep(best=Best("loss"))),
        ("best=loss:max", Keep(best=Best("loss", mode="max"))),
        ("best=val:loss:2", Keep(best=Best("val:loss", 2))),
        ("max_age_s=1e3,last=2", Keep(last=2, max_age_s=1000.0)),
        ("best=acc@5%", Keep(best=Best("acc@5%"))),
    ],
)
def test_what_people_leave_out_is_understood(words: str, keep: Keep) -> None:
    assert keep_of(words) == keep


@pytest.mark.parametrize(
    "words", ["", "all,last=1", "ALL", "last", "last=", "last=0", "every=1.5", "newest=3", "last=1,last=1"]
)
def test_words_that_say_no_rule_are_refused(words: str) -> None:
    with pytest.raises(Refused, match="expected"):
        keep_of(words)
