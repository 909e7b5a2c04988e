"""What a committer does next, for all that its members may say and in every order. [SAVE-81, SAVE-82]"""

from __future__ import annotations

from itertools import permutations, product

import pytest

from elastickpt.commit.committer import CommitNow, GiveUp, KeepWaiting, LookFor, Tally
from elastickpt.errors import RankFailure
from elastickpt.format.records import FileDigest

RANKS = (4, 7, 9)  # of members 0, 1, 2
FILES = tuple(FileDigest(f"fragments/{member:05d}.msgpack", 10, f"{member:032x}") for member in range(3))
FAILURES = tuple(RankFailure(rank, "no-space", f"no room on {rank}") for rank in RANKS)


def tally() -> Tally:
    return Tally(RANKS, now=100.0)


def next_of(one: Tally, *, now: float = 101.0) -> object:
    return one.next(now=now, missing_s=60.0)


@pytest.mark.parametrize("order", [*permutations(range(3))])
def test_it_finishes_when_all_have_attested_and_not_before(order: tuple[int, ...]) -> None:
    one = tally()
    for member in order:
        assert next_of(one) == KeepWaiting()
        one.present(member)
        one.said(member, FILES[member])
    assert next_of(one) == CommitNow(FILES)


@pytest.mark.parametrize("said", [*product("af-", repeat=3)])
def test_any_failure_aborts_whatever_the_others_said(said: tuple[str, ...]) -> None:
    one = tally()
    for member, what in enumerate(said):
        one.present(member)
        if what != "-":
            one.said(member, FILES[member] if what == "a" else FAILURES[member])
    failures = tuple(FAILURES[member] for member, what in enumerate(said) if what == "f")
    if failures:
        assert next_of(one) == GiveUp(failures)
    else:
        assert next_of(one) == (CommitNow(FILES) if said == ("a", "a", "a") else KeepWaiting())


def test_the_first_word_of_a_member_is_its_last() -> None:
    one = tally()
    for member in range(3):
        one.said(member, FILES[member])
    one.said(1, FAILURES[1])
    assert next_of(one) == CommitNow(FILES)
    other = tally()
    other.said(1, FAILURES[1])
    other.said(1, FILES[1])
    assert next_of(other) == GiveUp((FAILURES[1],))


def test_who_is_connected_is_waited_for_however_long() -> None:
    one = tally()
    for member in range(3):
        one.present(member)
    assert next_of(one, now=100.0 + 10**6) == KeepWaiting()


def test_who_never_came_or_was_lost_is_looked_for_after_the_limit() -> None:
    one = tally()
    one.present(0)
    one.present(1)
    one.lost(1, now=130.0)
    assert next_of(one, now=159.9) == KeepWaiting()
    assert next_of(one, now=160.0) == LookFor((2,))
    assert next_of(one, now=190.0) == LookFor((1, 2))
    one.present(2)  # it came after all
    assert next_of(one, now=190.0) == LookFor((1,))
    one.said(1, FILES[1])  # found in the draft
    assert next_of(one, now=190.0) == KeepWaiting()


def test_who_is_not_found_is_lost() -> None:
    one = tally()
    one.not_found(2)
    action = next_of(one)
    assert isinstance(action, GiveUp)
    assert [(failure.rank, failure.kind) for failure in action.report] == [(9, "rank-lost")]


def test_candidates_that_were_passed_over_are_looked_for_at_once() -> None:
    one = tally()
    one.present(1)
    one.present(2)
    one.passed_over([0])
    assert next_of(one, now=100.0) == LookFor((0,))
    one.present(0)  # it speaks after all
    assert next_of(one, now=100.0) == KeepWaiting()


def test_who_comes_while_its_attestation_is_looked_for_is_not_lost() -> None:
    one = tally()
    assert next_of(one, now=160.0) == LookFor((0, 1, 2))
    for member in range(3):
        one.present(member)
        one.not_found(member)
    assert next_of(one, now=161.0) == KeepWaiting()
