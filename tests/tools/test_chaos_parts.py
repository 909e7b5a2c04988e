"""The parts of `tools.chaos` that need no disk and no ranks: what a cut may leave, what it means, who told what, the record."""

from __future__ import annotations

import io
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from tools import chaos
from tools.bench.records import Machine
from tools.chaos import kills
from tools.chaos.blocklog import SECTOR, crash_states, flush_record, images, requests, write_record
from tools.chaos.cli import main
from tools.chaos.entrants import entrant
from tools.chaos.events import Event, Teller, Watcher
from tools.chaos.judge import OUTCOMES, Outcome, Promised, Seen, judge, judge_flipped, promised
from tools.chaos.power import Recording
from tools.chaos.processes import orphans_ended
from tools.chaos.records import Case, Report, from_json, tally, to_json
from tools.chaos.table import render
from tools.gloo_ranks import Outcome as Ended

A, B, C = (letter * SECTOR for letter in (b"a", b"b", b"c"))
LOG = write_record(0, A) + flush_record() + write_record(SECTOR, B * 2) + write_record(0, C)
DISK = 3 * SECTOR


def contents(count: int, seed: int = 1, after: int = 0) -> list[bytes]:
    log = requests(LOG)
    states = crash_states(log, after, count, seed)
    assert len({(state.position, state.kept) for state in states}) == len(states) <= count
    return [bytes(image) for image in images(log, states, DISK)]


def test_what_was_flushed_is_never_lost_and_what_was_not_may_be_torn_between_sectors() -> None:
    flushed = len(write_record(0, A) + flush_record())
    found = set(contents(200, after=flushed - 1))
    zero = bytes(SECTOR)
    assert found == {first + rest for first in (A, C) for rest in (zero * 2, B + zero, B * 2)}


def test_before_a_flush_a_write_may_be_absent() -> None:
    assert {bytes(DISK), A.ljust(DISK, b"\0")} <= set(contents(200))


def test_a_state_holds_nothing_that_was_asked_for_after_its_moment() -> None:
    log = requests(LOG)
    for state in crash_states(log, 0, 200, seed=2):
        assert all(log[number].end <= state.position for number, _ in state.kept)
        assert state.durable == 0 or log[state.durable - 1].kind == "flush"


def test_the_same_seed_gives_the_same_states() -> None:
    assert contents(6, seed=5) == contents(6, seed=5)
    assert contents(6, seed=5) != contents(6, seed=6)
    assert len(contents(6)) == 6


def whole(step: int, job: int = 0) -> Seen:
    return Seen(f"step-{step}", "whole", step, job)


@pytest.mark.parametrize(
    ("seen", "promise", "outcome"),
    [
        ([whole(1)], Promised(2, 1, frozenset({1})), "old"),
        ([whole(1), whole(2)], Promised(2, 1, frozenset({1})), "new"),
        ([], Promised(1, 0), "old"),
        ([whole(2)], Promised(2, 1, frozenset({1})), "lost"),
        ([whole(2)], Promised(2, 1), "new"),
        ([], Promised(2, 1), "lost"),
        ([whole(1)], Promised(3, 2), "lost"),
        ([whole(1), Seen("step-2", "error")], Promised(2, 1, frozenset({1})), "error"),
        ([Seen("step-1", "error")], Promised(2, 1, frozenset({1})), "lost"),
        ([whole(1), Seen("step-2", "wrong")], Promised(2, 1, frozenset({1})), "silently wrong"),
        ([whole(1), whole(3)], Promised(2, 1, frozenset({1})), "silently wrong"),
        (None, Promised(2, 1, frozenset({1})), "hang"),
        ([whole(2), whole(3)], Promised(3, 2, frozenset({1, 2}), 2), "new"),  # 3 is committed, retention went on behind it
        ([whole(3)], Promised(3, 2, frozenset({1, 2}), 2), "lost"),
    ],
)
def test_what_is_seen_and_what_was_promised_decide(seen: list[Seen] | None, promise: Promised, outcome: Outcome) -> None:
    assert judge(seen, promise).outcome == outcome


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        ([whole(1)], "harmless"),
        ([Seen("step-1", "error")], "detected"),
        ([whole(1), Seen("step-2", "error")], "detected"),
        ([Seen("step-1", "wrong"), Seen("step-2", "error")], "silently wrong"),
        ([whole(2)], "silently wrong"),
        ([whole(1, job=1)], "silently wrong"),
        ([], "lost"),
    ],
)
def test_a_flipped_bit_must_be_told_of_or_change_nothing(seen: list[Seen], outcome: Outcome) -> None:
    assert judge_flipped(seen, 1).outcome == outcome


def test_a_library_that_keeps_a_few_owes_the_newest_of_them() -> None:
    assert promised([1, 2, 3, 4], [1, 2, 3], keeps=2) == Promised(4, 3, frozenset({2, 3}), 2)
    assert promised([1, 2], [1], keeps=0) == Promised(2, 1, keeps=0)
    assert promised([], [], keeps=9) == Promised(0, 0, keeps=9)


def test_a_promise_holds_from_the_acknowledgement_of_rank_0_on() -> None:
    told = (("begun", 1, 100), ("acknowledged", 1, 300), ("begun", 2, 300), ("acknowledged", 2, 700))
    events = [Event(0, kind, step, 0.0, position) for kind, step, position in told]
    recording = Recording(b"", (*events, Event(1, "acknowledged", 2, 0.0, 500)))
    assert recording.start == 300
    assert recording.promise(299, 9) == Promised(1, 0, keeps=9)
    assert recording.promise(699, 9) == Promised(2, 1, frozenset({1}), 9)
    assert recording.promise(700, 9) == Promised(2, 2, frozenset({1, 2}), 9)


def test_a_watcher_waits_for_all_ranks_and_not_for_those_that_have_ended(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path / "pipe")
    tellers = [Teller(tmp_path / "pipe", rank) for rank in range(2)]
    tellers[0].tell("begun", 1)
    soon, late = time.monotonic() + 0.05, time.monotonic() + 60
    assert watcher.wait("begun", frozenset({0}), 1, late)
    assert not watcher.wait("begun", frozenset({0, 1}), 1, soon)
    tellers[1].tell("ended", 0)
    assert not watcher.wait("begun", frozenset({0, 1}), 1, late)
    assert watcher.wait("ended", frozenset({1}), None, late)
    watcher.close()


def test_orphans_are_ended_and_others_left() -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        with orphans_ended(0.1):
            subprocess.run(["sh", "-c", "sleep 600 & sleep 600 &"], check=True)
            assert len(psutil.Process().children(recursive=True)) >= 3
        assert [process.pid for process in psutil.Process().children() if process.name() == "sleep"] == [other.pid]
        other.kill()


def report() -> Report:
    cases = [Case(number, "nothing lost", f"cut {number}", outcome) for number, outcome in enumerate([*OUTCOMES, *OUTCOMES])]
    cases.append(Case(99, "a subset, torn", "cut 99", "old", next_save="[it] failed"))
    cases.append(Case(100, "helper", "cut 100", "old", same_job=""))
    cases.append(Case(101, "helper", "cut 101", "old", same_job="[broken] pipe"))
    machine = Machine(2, 25, (("disk", "ext4"),), "Linux 6.1", "3.11.0", "2.13.0")
    return Report(
        "save", "2026-01-02", "a few", machine, (tally(entrant("elastickpt"), cases, "7 writes"),), {"tc": "no [module]"}
    )


def test_a_record_survives_json_and_is_drawn() -> None:
    assert from_json(to_json(report())) == report()
    (one,) = report().tallies
    assert sum(one.counts.values()) == 2 * len(OUTCOMES) + 3
    assert (one.is_clean, one.next_save_failed, one.saved_on, one.helpers_dead) == (False, 1, 1, 2)
    assert [case.number for case in one.bad] == [0, 10, 1, 11, 2, 12, 3, 13, 6, 16, 7, 17, 99, 101]
    out = io.StringIO()
    Console(file=out, width=200).print(render(report()))
    assert "next save: [it] failed" in out.getvalue()
    assert "next save in the same job: [broken] pipe" in out.getvalue()
    assert "1 of 2" in out.getvalue()
    assert "absent: tc: no [module]" in out.getvalue()


@pytest.mark.parametrize(("same_job", "is_clean"), [(None, True), ("", True), ("broken pipe", False)])
def test_a_job_that_cannot_save_on_behind_a_dead_writer_is_not_clean(same_job: str | None, is_clean: bool) -> None:
    cases = [Case(1, "helper", "killed", "new", same_job=same_job)]
    assert tally(entrant("elastickpt-async"), cases, "").is_clean == is_clean


def test_records_of_before_the_same_job_was_asked_are_still_shown() -> None:
    oldest = Path(chaos.__file__).with_name("results") / "2026-11-26-save.json"
    assert all(one.helpers_dead == 0 for one in from_json(oldest.read_text()).tallies)
    assert main(["show", str(oldest)]) == 0


def test_a_name_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["save", "--contestant", "elastickpt,dpc"])
    assert stopped.value.code == 2
    assert "'dpc' is none of elastickpt, elastickpt-async" in capsys.readouterr().err


def test_what_failed_is_told_without_the_folders_of_this_machine() -> None:
    text = 'File "/opt/x/lib/python3.11/a/b.py", line 3, in f [/__w/g/pair.cc:5] at /data/c'
    told = kills._failure((Ended(rank=0, value=text, error=None, traceback="", output="", status=0, at=0.0),))
    assert told == 'File "b.py", line 3, in f [pair.cc:5] at /data/c'
