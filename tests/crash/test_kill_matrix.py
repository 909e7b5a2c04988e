"""One of several processes killed at a random moment of a save: what is left is loaded, and the next save works.

[SAVE-3, SAVE-57, SAVE-60, SAVE-62]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bad_contestants import HANGING, HELPLESS, TEARING
from memory_folder import memory_folder

from tools.chaos.cli import main
from tools.chaos.entrants import Entrant, entrant
from tools.chaos.kills import Draw, Setting, draw, kill_once
from tools.chaos.records import Case, from_json

pytestmark = pytest.mark.ranks

OURS = entrant("elastickpt")
TRIES = 6


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory if the machine has such a directory: what is lost with a process does not depend on the disk."""
    with memory_folder(tmp_path) as found:
        yield found


def killed(setting: Setting, count: int, who: Entrant = OURS) -> list[Case]:
    found = [kill_once(who, setting, draw(who, setting, number)) for number in range(count)]
    return [case for case in found if case is not None]


def first(who: Entrant, setting: Setting, kill: Draw, holds: Callable[[Case], bool]) -> Case:
    """The first case of this kill that is so. A kill comes by the clock: on a busy machine it may strike another moment."""
    found = [kill_once(who, setting, kill)]
    while found[-1] is None or not holds(found[-1]):
        assert len(found) < TRIES, found
        found.append(kill_once(who, setting, kill))
    return found[-1]


def test_a_random_kill_leaves_the_old_or_the_new_checkpoint_and_the_next_save_works(folder: Path) -> None:
    setting = Setting(folder, ranks=2, seed=1, scale=1)
    cases: list[Case] = []
    for number in range(4 * TRIES):  # some come too late
        cases += [case for case in (kill_once(OURS, setting, draw(OURS, setting, number)),) if case is not None]
        if len(cases) >= 4 and {case.group for case in cases} == {"committer", "trainer"}:
            break
    assert [case for case in cases if case.is_bad] == []
    assert {case.group for case in cases} == {"committer", "trainer"}


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["elastickpt", "elastickpt-packed"])
def test_many_random_kills(folder: Path, name: str, ranks: int) -> None:
    cases = killed(Setting(folder, ranks=ranks, seed=2), 60, entrant(name))
    assert [case for case in cases if case.is_bad] == []
    assert {case.outcome for case in cases} == {"old", "new"}


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["elastickpt-async", "elastickpt-packed-async", "elastickpt-large", "elastickpt-run"])
def test_many_random_kills_of_saves_beside_training(folder: Path, name: str, ranks: int) -> None:
    """Writer processes are killed too: then whoever waits for the save still gets it."""
    cases = killed(Setting(folder, ranks=ranks, seed=3), 60, entrant(name))
    assert [case for case in cases if case.is_bad] == []
    assert {case.outcome for case in cases} == {"old", "new"}
    assert {case.group for case in cases} == {"committer", "trainer", "helper"}


def test_the_same_number_draws_the_same_kill(folder: Path) -> None:
    one, other = Setting(folder, 4, seed=1), Setting(folder, 4, seed=2)
    assert [draw(OURS, one, n) for n in range(20)] == [draw(OURS, one, n) for n in range(20)]
    assert [draw(OURS, one, n) for n in range(20)] != [draw(OURS, other, n) for n in range(20)]
    assert {draw(OURS, one, n).rank for n in range(40)} == {0, 1, 2, 3}
    assert {draw(OURS, one, n).role for n in range(40)} == set(OURS.roles)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_contestants_suffer_the_same_kills_by_a_helper_or_by_its_rank(folder: Path, ranks: int) -> None:
    setting, beside = Setting(folder, ranks, seed=1), entrant("elastickpt-async")
    pairs = [(draw(OURS, setting, number), draw(beside, setting, number)) for number in range(300)]
    assert [(a.rank, a.step, a.share) for a, _ in pairs] == [(b.rank, b.step, b.share) for _, b in pairs]
    assert all(a == b or (b.role == "helper" and a.role == ("trainer" if a.rank else "committer")) for a, b in pairs)
    assert 80 <= sum(b.role == "helper" for _, b in pairs) <= 120


# -- what does it wrong is found -----------------------------------------------------------------------------------------


def test_a_library_that_tears_is_found_silently_wrong(folder: Path) -> None:
    setting, kill = Setting(folder, ranks=1, seed=1, scale=1), Draw(0, "committer", 0, 3, 0.5)
    case = first(TEARING, setting, kill, lambda case: case.outcome == "silently wrong")
    assert "step 2 of job 0" in case.detail
    assert "step 3 of job 0" in case.detail


def test_a_library_that_waits_for_the_dead_is_found_hanging(folder: Path) -> None:
    setting = Setting(folder, ranks=2, seed=1, scale=1, limit_s=2.0)
    case = first(HANGING, setting, Draw(0, "trainer", 1, 3, 0.4), lambda case: case.outcome == "hang")
    assert case.next_save == ""
    assert "rank 0 had not returned 2 s after" in case.detail
    assert "in _without_limit" in case.detail


@pytest.mark.parametrize("share", [0.3, 1.05])
def test_a_library_that_never_replaces_a_dead_writer_is_found(folder: Path, share: float) -> None:
    setting, kill = Setting(folder, ranks=2, seed=1, scale=1), Draw(0, "helper", 1, 3, share)
    case = first(HELPLESS, setting, kill, lambda case: bool(case.same_job))
    assert case.next_save == "", "a new job starts a new helper"
    assert "the helper is dead" in case.same_job
    assert case.is_bad


def test_a_dead_writer_of_ours_is_replaced_in_the_same_job(folder: Path) -> None:
    ours = entrant("elastickpt-async")
    case = first(ours, Setting(folder, ranks=2, seed=1, scale=1), Draw(0, "helper", 0, 3, 0.5), lambda case: True)
    assert (case.same_job, case.is_bad) == ("", False)


def test_one_kill_is_repeated_alone_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "save --contestant bad_contestants:TEARING,no_such_module:X --ranks 1 --scale 1 --only 3 --json --where"
    assert main([*line.split(), str(folder)]) == 0, "what is found bad is not ours"
    report = from_json(capsys.readouterr().out)
    (one,) = report.tallies
    assert (one.contestant, sum(one.counts.values())) == ("bad_contestants:TEARING", 1)
    assert [case.number for case in one.bad] in ([], [3])
    assert report.absent == {"no_such_module:X": "No module named 'no_such_module'"}
    assert list(folder.iterdir()) == []
