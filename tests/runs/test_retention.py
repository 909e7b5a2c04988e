"""What is kept, and why: rules over the live branch, limits, and the one that never goes. [RUN-80..87]"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_actors import commit_of

from elastickpt.errors import Refused
from elastickpt.ledger.branch import BranchState, CommitEntry
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.retention import Best, Judgement, Keep, best_of, judge, removable

NOW = 10_000.0
GOOD: dict[AttemptId, bool] = {}


def entry(
    step: int, *, epoch: int = 1, state: BranchState = "live", loss: float | None = None, nbytes: int = 10, age_s: float = 0.0
) -> CommitEntry:
    attempt = AttemptId(step, epoch, 1)
    metrics = () if loss is None else (("loss", loss),)
    return CommitEntry(attempt, state, commit_of(attempt, nbytes=nbytes, time=NOW - age_s), metrics)


def live(*steps: int) -> list[CommitEntry]:
    return [entry(step) for step in sorted(steps, reverse=True)]


def kept(keep: Keep, entries: list[CommitEntry], *, verified: dict[AttemptId, bool] = GOOD) -> dict[int, tuple[str, ...]]:
    return {one.id.step: one.reasons for one in judge(keep, entries, now=NOW, verified=verified) if one.kept}


def test_reasons_are_listed_for_each() -> None:
    """[RUN-81]"""
    entries = live(1000, 1500, 2000, 2400, 2500)
    assert kept(Keep(last=2, every=1000), entries) == {
        2500: ("newest", "last 2"),
        2400: ("last 2",),
        2000: ("every 1000",),
        1000: ("every 1000",),
    }


@pytest.mark.parametrize("metric", [3, None, b"loss", "loss\udc80"])
def test_the_name_of_a_metric_is_text(metric: object) -> None:
    """Rules are recorded, and a record holds valid text only."""
    with pytest.raises(Refused):
        Best(metric)  # type: ignore[arg-type]


def test_without_a_rule_all_are_kept() -> None:
    """[RUN-82]"""
    assert set(kept(Keep(), live(1, 2, 3))) == {1, 2, 3}


@pytest.mark.parametrize(("mode", "expected"), [("min", {4, 2, 5}), ("max", {1, 3, 5})])
def test_the_best_are_kept_by_metric(mode: str, expected: set[int]) -> None:
    losses = {1: 9.0, 2: 1.0, 3: 8.0, 4: 1.0, 5: math.nan}
    entries = [entry(step, loss=loss) for step, loss in sorted(losses.items(), reverse=True)]
    assert set(kept(Keep(best=Best("loss", 2, mode=mode)), entries)) == expected  # type: ignore[arg-type]


def test_nan_and_no_value_are_never_best_and_of_equal_ones_the_newer_is() -> None:
    """[RUN-83]"""
    entries = [entry(4, loss=math.nan), entry(3), entry(2, loss=1.0), entry(1, loss=1.0)]
    assert [one.step for one in best_of(Best("loss", 4), entries)] == [2, 1]


def test_a_damaged_one_takes_no_good_ones_place_and_stays_while_nothing_newer_is_good() -> None:
    """[RUN-84, RUN-85]"""
    entries = live(1, 2, 3, 4)
    verified = {AttemptId(4, 1, 1): False, AttemptId(2, 1, 1): False}
    found = kept(Keep(last=2), entries, verified=verified)
    assert found == {
        4: ("damaged; nothing newer is good",),
        3: ("newest", "last 2"),
        1: ("last 2",),
    }


def test_the_newest_that_was_verified_is_kept_until_a_newer_one_is() -> None:
    """[RUN-84]"""
    found = kept(Keep(last=1), live(1, 2, 3), verified={AttemptId(1, 1, 1): True})
    assert found == {3: ("newest", "last 1"), 1: ("newest that was verified",)}


def test_an_abandoned_commit_stays_until_the_live_branch_has_come_as_far() -> None:
    """[RUN-86]"""
    aside = [entry(step, state="abandoned") for step in (30, 20)]
    assert set(kept(Keep(last=1), [entry(25, epoch=2), *aside])) == {25, 30}
    assert set(kept(Keep(last=1), [entry(30, epoch=2), entry(25, epoch=2), *aside])) == {30}
    assert removable(judge(Keep(last=1), [entry(30, epoch=2), *aside], now=NOW, verified={})) == (
        AttemptId(20, 1, 1),
        AttemptId(30, 1, 1),
    )


def test_what_is_in_use_stays() -> None:
    verdicts = judge(Keep(last=1, max_nbytes=1), live(1, 2), now=NOW, verified={}, in_use={AttemptId(1, 1, 1)})
    assert verdicts == (
        Judgement(AttemptId(2, 1, 1), True, ("newest", "last 1")),
        Judgement(AttemptId(1, 1, 1), True, ("in use",)),
    )


def test_age_removes_what_rules_keep_but_not_the_newest() -> None:
    """[RUN-87]"""
    entries = [entry(3, age_s=900.0), entry(2, age_s=950.0), entry(1, age_s=10.0)]
    assert set(kept(Keep(last=3, max_age_s=100.0), entries)) == {3, 1}
    (gone,) = [one for one in judge(Keep(last=3, max_age_s=100.0), entries, now=NOW, verified={}) if not one.kept]
    assert gone.reasons == ("older than 100 s",)


def test_bytes_remove_abandoned_ones_first_then_old_ones_then_the_best() -> None:
    """[RUN-87]"""
    entries = [entry(5), entry(4), entry(3, loss=1.0), entry(2), entry(9, state="abandoned")]
    keep = Keep(last=9, best=Best("loss"), max_nbytes=50)
    assert set(kept(keep, entries)) == {5, 4, 3, 2, 9}
    for limit, expected in ((49, {5, 4, 3, 2}), (39, {5, 4, 3}), (29, {5, 3}), (19, {5}), (1, {5})):
        assert set(kept(Keep(last=9, best=Best("loss"), max_nbytes=limit), entries)) == expected


@pytest.mark.parametrize(
    "wrong", [{"last": 0}, {"every": 0}, {"last": 1.5}, {"last": True}, {"max_nbytes": 0}, {"max_age_s": 0.0}]
)
def test_a_rule_that_keeps_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Refused):
        Keep(**wrong)  # type: ignore[arg-type]


def test_a_best_of_no_mode_or_none_is_refused() -> None:
    with pytest.raises(Refused, match="'min' or 'max'"):
        Best("loss", 1, mode="least")  # type: ignore[arg-type]
    with pytest.raises(Refused):
        Best("loss", 0)


STATES = st.sampled_from(["live", "live", "live", "abandoned"])
COUNTS = st.none() | st.integers(1, 4)
KEEPS = st.builds(
    Keep,
    last=COUNTS,
    every=COUNTS,
    best=st.none() | st.builds(Best, st.just("loss"), st.integers(1, 3), st.sampled_from(["min", "max"])),
    max_age_s=st.none() | st.floats(1, 100),
    max_nbytes=st.none() | st.integers(1, 60),
)


@st.composite
def histories(draw: st.DrawFn) -> list[CommitEntry]:
    found = {}
    for step in draw(st.lists(st.integers(0, 12), unique=True, max_size=8)):
        loss = draw(st.none() | st.sampled_from([0.5, 1.0, math.nan]))
        epoch, state = draw(st.integers(1, 3)), draw(STATES)
        one = entry(step, epoch=epoch, state=state, loss=loss, nbytes=draw(st.integers(0, 30)), age_s=draw(st.floats(0, 120)))
        found[step] = one if draw(st.integers(0, 9)) else CommitEntry(one.id, state, None, one.metrics, "folder is gone")
    aside = sorted((one for one in found.values() if one.state == "abandoned"), key=lambda one: one.id, reverse=True)
    return [*sorted((one for one in found.values() if one.state == "live"), key=lambda one: -one.step), *aside]


VERIFIED = st.dictionaries(st.builds(AttemptId, st.integers(0, 12), st.integers(1, 3), st.just(1)), st.booleans(), max_size=6)


@given(KEEPS, histories(), VERIFIED)
def test_the_newest_good_one_stays_whatever_the_rules_are(
    keep: Keep, entries: list[CommitEntry], verified: dict[AttemptId, bool]
) -> None:
    """[RUN-80, RUN-84]"""
    verdicts = judge(keep, entries, now=NOW, verified=verified)
    good = [one.id for one in entries if one.state == "live" and one.commit is not None and verified.get(one.id, True)]
    staying = {one.id for one in verdicts if one.kept}
    assert set(good[:1]) <= staying
    assert {one for one in good if verified.get(one)} == set() or any(verified.get(one) for one in staying & set(good))


@given(KEEPS, histories(), VERIFIED)
def test_each_has_one_verdict_with_reasons_and_judging_again_changes_nothing(
    keep: Keep, entries: list[CommitEntry], verified: dict[AttemptId, bool]
) -> None:
    """What was removed takes nothing else with it. [RUN-81]"""
    verdicts = judge(keep, entries, now=NOW, verified=verified)
    assert [one.id for one in verdicts] == [one.id for one in entries]
    assert all(one.reasons for one in verdicts)
    staying = {one.id for one in verdicts if one.kept}
    again = judge(keep, [one for one in entries if one.id in staying], now=NOW, verified=verified)
    assert {one.id for one in again if one.kept} == staying


@given(KEEPS, histories())
def test_limits_hold_for_all_but_the_newest(keep: Keep, entries: list[CommitEntry]) -> None:
    """[RUN-87]"""
    staying = {one.id for one in judge(keep, entries, now=NOW, verified={}) if one.kept}
    good = [one.id for one in entries if one.state == "live" and one.commit is not None]
    free = [one for one in entries if one.id in staying - set(good[:1])]
    if keep.max_age_s is not None:
        assert all(one.time is None or NOW - one.time <= keep.max_age_s for one in free)
    total = sum(one.nbytes or 0 for one in entries if one.id in staying)
    assert keep.max_nbytes is None or total <= keep.max_nbytes or not [one for one in free if one.nbytes]


@given(histories(), COUNTS, COUNTS)
def test_without_limits_the_rules_are_these(entries: list[CommitEntry], last: int | None, every: int | None) -> None:
    """Against the rules said once more, one set each. [RUN-80, RUN-82, RUN-86]"""
    good = [one for one in entries if one.state == "live" and one.commit is not None]
    reached = max((one.step for one in good), default=-1)
    expected = {one.id for one in good[: last or 0]} | {one.id for one in good if every and one.step % every == 0}
    expected |= {one.id for one in good[:1]}
    expected |= {one.id for one in entries if one.step > reached and (one.state == "abandoned" or one.commit is None)}
    if last is None and every is None:
        expected = {one.id for one in entries}
    verdicts = judge(Keep(last=last, every=every), entries, now=NOW, verified={})
    assert {one.id for one in verdicts if one.kept} == expected
