"""`elastickpt-run` with workers that sleep: who dies, is stopped or raises, and what becomes of the job."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from launched import LIMIT_S, SLEEPER, alive, launched

from elastickpt.cli.launch import main
from elastickpt.elastic.agent import Agent, WorkerProgram, ZygoteLost
from elastickpt.elastic.environment import Told
from elastickpt.elastic.limits import OLD_SAVES_S
from elastickpt.runs import view_saves

QUICK = (SLEEPER, 5, 0.01)


def stands(folder: Path) -> dict[int, int]:
    """By stage, where its member stood when the job was done."""
    return {int(one.name.removeprefix("end-")): int(one.read_text()) for one in folder.glob("end-*")}


def one(events: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = events
    return found


def test_a_job_is_done(tmp_path: Path) -> None:
    """[CLI-90, REC-40, REC-44]"""
    with launched(tmp_path, "--stages", 3, "--spares", 1, script=QUICK) as job:
        assert job.code() == 0, job.stderr
    members = job.events("member")
    assert sorted(e["place"]["stage"] for e in members if e["place"]) == [0, 1, 2]
    assert [e["place"] for e in members].count(None) == 1
    ended = job.events()[-1]
    assert (ended["event"], ended["code"], ended["step"]) == ("ended", 0, 5)
    assert len({e["uid"] for e in members}) == 4
    assert alive([e["pid"] for e in members]) == []
    assert stands(tmp_path) == {0: 5, 1: 5, 2: 5}


def test_a_worker_that_is_stopped_is_silent(tmp_path: Path) -> None:
    """It is killed before its place is given away. On a busy machine others may be silent, too. [REC-30, REC-31]"""
    script = (*QUICK, "stop:compute:0:3")
    with launched(tmp_path, "--stages", 4, "--spares", 1, "--max-replacements", 3, "--heartbeat", 4, script=script) as job:
        pid = job.pid_of(0)
        assert job.code() == 0, job.stderr
    lost = [e for event in job.events("recovery") for e in event["lost"]]
    assert ("silent", None) in [(e["why"], e["signal"]) for e in lost if e["stage"] == 0]
    assert alive([pid, *(e["pid"] for e in job.events("member"))]) == []
    assert stands(tmp_path) == {0: 5, 1: 5, 2: 5, 3: 5}


@pytest.mark.parametrize("fault", ["kill", "exit"])
def test_a_spare_takes_the_place_of_a_worker_that_is_gone(tmp_path: Path, fault: str) -> None:
    """[REC-30, REC-31, REC-41, REC-42, REC-43]"""
    script = (*QUICK, f"{fault}:compute:0:3")
    with launched(tmp_path, "--stages", 4, "--spares", 1, script=script) as job:
        assert job.code() == 0, job.stderr
    event = one(job.events("recovery"))
    lost = one(event["lost"])
    first = next(e for e in job.events("member") if e["place"] and e["place"]["stage"] == 0)
    number = 9 if fault == "kill" else None
    assert (lost["stage"], lost["pid"], lost["why"], lost["signal"]) == (0, first["pid"], "exit", number)
    assert (event["step"], event["rung"], event["approximate"]) == (2, "partner", True)
    assert event["decision"] in ("replay", "forward")  # as others have said by then that they have stepped, or not
    assert event["from"] == lost["from"] == {"stages": [1], "alpha": None}
    assert event["considered"] == [{"rung": "partner", "why": "possible", "stage": 0}]
    seconds = list(event["seconds"].values())
    assert None not in seconds
    assert seconds == sorted(seconds)
    assert event["bytes"] == {"moved": 32, "read": 0}
    assert stands(tmp_path) == {0: 5, 1: 5, 2: 5, 3: 5}
    assert alive([e["pid"] for e in job.events("member")]) == []


def test_who_makes_no_progress_in_a_phase_loses_its_place(tmp_path: Path) -> None:
    """Though it lives, and sends beats. [REC-30, REC-31, REC-32]"""
    script = (*QUICK, "hang:short:2:3")
    with launched(tmp_path, "--stages", 4, "--spares", 1, script=script) as job:
        assert job.code() == 0, job.stderr
    event = one(job.events("recovery"))
    lost = one(event["lost"])
    assert (lost["stage"], lost["why"], lost["signal"]) == (2, "stalled", None)
    assert event["seconds"]["detected"] >= 4.0
    assert alive([e["pid"] for e in job.events("member")]) == []
    assert stands(tmp_path) == {0: 5, 1: 5, 2: 5, 3: 5}


def test_without_a_spare_another_worker_is_forked(tmp_path: Path) -> None:
    """[REC-34, REC-35]"""
    script = (*QUICK, "kill:compute:1:3")
    with launched(tmp_path, "--stages", 4, "--max-replacements", 1, "--spare-wait", 0.2, script=script) as job:
        assert job.code() == 0, job.stderr
    assert one(job.events("recovery"))["lost"][0]["stage"] == 1


def test_without_a_spare_the_job_ends(tmp_path: Path) -> None:
    script = (*QUICK, "kill:compute:1:3")
    with launched(tmp_path, "--stages", 3, "--spare-wait", 0.2, script=script) as job:
        assert job.code() == 75, job.stderr
    ended = job.events()[-1]
    assert (ended["event"], ended["code"], ended["step"]) == ("ended", 75, 2)
    assert ended["why"].startswith("no-spare: ")
    assert "stages [1] of 3" in ended["why"]


def test_no_rung_is_possible(tmp_path: Path) -> None:
    """Both of an end pair are lost, the second one while groups are made anew; why each rung is passed over is said."""
    script = (*QUICK, "kill:compute:0:3", "kill:form:1:2")
    with launched(tmp_path, "--stages", 4, "--spares", 2, script=script) as job:
        assert job.code() == 75, job.stderr
    why = job.events()[-1]["why"]
    assert why.startswith("no-source: ")
    assert "stage 0 cannot be rebuilt" in why
    assert "partner: its partner is lost too" in why
    assert "checkfree: " in why


def test_what_raises_once_is_replayed(tmp_path: Path) -> None:
    """[REC-15, CLI-94]"""
    script = (*QUICK, "raise:compute:1:3")
    with launched(tmp_path, "--stages", 3, "--log-dir", tmp_path / "logs", script=script) as job:
        assert job.code() == 0, job.stderr
    event = one(job.events("recovery"))
    lost = one(event["lost"])
    assert (event["rung"], event["approximate"], event["step"], event["from"]) == (
        "replay",
        False,
        2,
        {"stages": [], "alpha": None},
    )
    assert (lost["stage"], lost["why"], lost["signal"]) == (1, "raised", None)
    assert "ValueError: a fault of the test at compute" in lost["traceback"]
    assert len(job.events("member")) == 3
    assert "stage 1" in job.stderr
    assert "ValueError: a fault of the test at compute" in job.stderr


def test_what_raises_twice_ends_the_job(tmp_path: Path) -> None:
    script = (*QUICK, "raise-always:compute:1:3")
    with launched(tmp_path, "--stages", 3, "--spares", 1, script=script) as job:
        assert job.code() == 1, job.stderr
    assert job.events()[-1]["why"].startswith("step-failed: ")
    assert "ValueError: a fault of the test at compute" in job.stderr


def test_an_error_that_leaves_the_block_is_the_loss_of_the_place(tmp_path: Path) -> None:
    """[CLI-94]"""
    script = (*QUICK, "raise:step:1:3")
    with launched(tmp_path, "--stages", 4, "--spares", 1, script=script) as job:
        assert job.code() == 0, job.stderr
    event = one(job.events("recovery"))
    assert (event["decision"], event["step"], event["lost"][0]["why"]) == ("forward", 3, "raised")
    assert job.stderr.count("ValueError: a fault of the test at step") == 1
    assert stands(tmp_path) == {0: 5, 1: 5, 2: 5, 3: 5}


def test_a_spare_that_cannot_take_the_place_is_dropped(tmp_path: Path) -> None:
    """Its traceback is in the event; the next one takes the place. [REC-11, REC-30, CLI-94]"""
    script = (*QUICK, "kill:compute:0:3", "raise:form:0:2")
    with launched(tmp_path, "--stages", 4, "--spares", 2, script=script) as job:
        assert job.code() == 0, job.stderr
    lost = one(job.events("recovery"))["lost"]
    assert [(e["stage"], e["why"]) for e in lost] == [(0, "exit"), (0, "raised")]
    assert "ValueError: a fault of the test at form" in lost[1]["traceback"]
    assert job.stderr.count("ValueError: a fault of the test at form") == 1
    assert stands(tmp_path) == {0: 5, 1: 5, 2: 5, 3: 5}


def test_a_step_that_is_lost_again_and_again_ends_the_job(tmp_path: Path) -> None:
    script = (*QUICK, *["kill:compute:1:3"] * 3)
    with launched(tmp_path, "--stages", 4, "--spares", 3, script=script) as job:
        assert job.code() == 1, job.stderr
    assert "failed 3 times" in job.events()[-1]["why"]


def test_an_error_before_the_first_step_ends_the_job(tmp_path: Path) -> None:
    with launched(tmp_path, "--stages", 2, "--spares", 1, script=(*QUICK, "raise:form:1:0")) as job:
        assert job.code() == 1, job.stderr
    assert "ValueError: a fault of the test at form" in job.stderr


def test_a_script_that_never_joins(tmp_path: Path) -> None:
    """[REC-36]"""
    with launched(tmp_path, "--stages", 2, script=(*QUICK, "raise-always:start:*:0")) as job:
        assert job.code() == 1, job.stderr
    assert "before it joined" in job.events()[-1]["why"]
    assert "ValueError: a fault of the test at start" in job.stderr


def test_an_error_after_the_job_is_done(tmp_path: Path) -> None:
    """[REC-44, REC-45]"""
    with launched(tmp_path, "--stages", 2, script=(*QUICK, "raise:after:*:0")) as job:
        assert job.code() == 1, job.stderr
    ended = one(job.events("ended"))
    assert (ended["code"], ended["step"]) == (1, 5)
    assert "afterwards" in ended["why"]
    assert job.stderr.count("ValueError: a fault of the test at after") == 1
    assert stands(tmp_path) == {0: 5, 1: 5}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_end_the_job(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """[CLI-90, CLI-92]"""
    with launched(tmp_path, "--stages", 2, "--spares", 1, script=(SLEEPER, 100_000, 0.01)) as job:
        job.until(lambda: len(list(tmp_path.glob("in-*"))) == 3, "all workers")
        job.process.send_signal(number)
        assert job.code() == code, job.stderr
    ended = job.events()[-1]
    assert (ended["event"], ended["code"]) == ("ended", code)
    if number is signal.SIGTERM:
        assert set(stands(tmp_path).values()) == {ended["step"]}
    assert alive([e["pid"] for e in job.events("member")]) == []


def test_a_signal_to_a_worker_ends_no_other_one(tmp_path: Path) -> None:
    with launched(tmp_path, "--stages", 4, "--spares", 1, script=(SLEEPER, 100_000, 0.02)) as job:
        job.until(lambda: len(job.events("member")) == 5, "all members and the spare")
        job.until(lambda: (tmp_path / "begun-3").exists(), "the first step")
        os.kill(job.pid_of(3), signal.SIGTERM)
        job.until(lambda: job.events("recovery"), "a recovery")
        job.process.terminate()
        assert job.code() == 75, job.stderr
    lost = [e for event in job.events("recovery") for e in event["lost"]]
    assert [(e["stage"], e["why"], e["signal"]) for e in lost] == [(3, "exit", 15)]


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.long)])
def test_when_the_launcher_is_killed_its_workers_leave(tmp_path: Path, *, stopped: bool) -> None:
    """A worker that is stopped cannot leave by itself, and is killed. [REC-23]"""
    with launched(tmp_path, "--stages", 3, script=(SLEEPER, 100_000, 0.01)) as job:
        job.until(lambda: len(list(tmp_path.glob("in-*"))) == 3, "all workers")
        pids = [e["pid"] for e in job.events("member")]
        zygote = [child.pid for child in job.children() if child.pid not in pids]
        if stopped:
            os.kill(pids[1], signal.SIGSTOP)
        job.process.kill()
        job.process.wait()
        wait_for_end([*pids, *zygote])


def test_a_job_outlives_the_process_that_forks_its_workers(tmp_path: Path) -> None:
    """Its members live on. Another one forks those that are wanted from then on; it is seen when one of the older ones ends,
    and how is not known. [REC-46]"""
    with launched(tmp_path, "--stages", 4, "--max-replacements", 2, script=(SLEEPER, 100_000, 0.02)) as job:
        job.until(lambda: len(list(tmp_path.glob("in-*"))) == 4, "all workers")
        pids = [e["pid"] for e in job.events("member")]
        for number, stage in enumerate((3, 0), 1):
            others = [e["pid"] for e in job.events("member")]
            (zygote,) = [child.pid for child in job.children() if child.pid not in others]
            job.until(lambda: (tmp_path / f"begun-{stage}").exists(), "a step")  # noqa: B023
            os.kill(zygote, signal.SIGKILL)
            job.until(lambda: job.stderr.count("another one is started") == number, "another zygote")  # noqa: B023
            os.kill(job.pid_of(stage), signal.SIGKILL)
            job.until(lambda: len(job.events("recovery")) == number, "a recovery")  # noqa: B023
        job.process.terminate()
        assert job.code() == 75, job.stderr
    lost = [one for event in job.events("recovery") for one in event["lost"]]
    assert [(one["stage"], one["why"], one["signal"]) for one in lost] == [(3, "exit", None), (0, "exit", None)]
    assert len({e["pid"] for e in job.events("member")} - {*pids}) == 2
    assert alive([e["pid"] for e in job.events("member")]) == []
    assert len(set(stands(tmp_path).values())) == 1


def test_a_process_that_ended_before_it_forked_anybody_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one would fare no better. [REC-46]"""
    monkeypatch.setattr("elastickpt.elastic.agent._CODE", "raise SystemExit(3)  # {} {}")
    agent = Agent(WorkerProgram(("x",)), Told("", "", "", "", "", torchrun=False))
    agent.start("0.0")
    assert select.select([agent], [], [], LIMIT_S)[0]
    with pytest.raises(ZygoteLost, match="ended with 3"):
        list(agent.receive())
    agent.close()


def wait_for_end(pids: list[int]) -> None:
    end = time.monotonic() + LIMIT_S
    while alive(pids):
        assert time.monotonic() < end, f"still there: {alive(pids)}"
        time.sleep(0.02)


def test_a_second_machine_is_lost_as_a_whole(tmp_path: Path) -> None:
    """With a place that one of its workers had taken. It was there before anybody listened. [REC-20, CLI-93]"""
    at = f"127.0.0.1:{free_port()}"
    script = (SLEEPER, 100_000, 0.02)
    far_arguments = ("--join", at, "--workers", 2, "--host", "far", "--zone", "z")
    near_arguments = ("--stages", 4, "--coordinator", at, "--workers", 4, "--max-replacements", 3)
    with launched(tmp_path, *near_arguments, script=script, token="secret") as job:
        job.until(lambda: len(job.events("member")) == 4, "all members")
        with launched(tmp_path, *far_arguments, script=script, token="secret") as far:
            job.until(lambda: len([e for e in job.events("member") if e["host"] == "far"]) == 2, "spares of another machine")
            job.until(lambda: (tmp_path / "begun-1").exists(), "the first step")
            os.kill(job.pid_of(1), signal.SIGKILL)
            job.until(lambda: [e for e in job.events("member") if e["host"] == "far" and e["place"]], "a far worker at a place")
            job.until(lambda: job.events("recovery"), "the first recovery")
            far.process.kill()
            far.process.wait()
            job.until(lambda: len(job.events("recovery")) == 2, "the second recovery")
            job.process.terminate()
            assert job.code() == 75, job.stderr
        lost = job.events("recovery")[1]["lost"]
        assert [(e["stage"], e["why"]) for e in lost] == [(1, "closed")]
        assert {e["zone"] for e in job.events("member") if e["host"] == "far"} == {"z"}
        wait_for_end([e["pid"] for e in job.events("member")])
    assert len(set(stands(tmp_path).values())) == 1


def test_a_launcher_waits_for_the_coordinator(tmp_path: Path) -> None:
    at = f"127.0.0.1:{free_port()}"
    far_arguments = ("--join", at, "--workers", 1, "--host", "far")
    with launched(tmp_path, *far_arguments, script=QUICK, token="secret") as far:
        near_arguments = ("--stages", 2, "--coordinator", at, "--workers", 1)
        with launched(tmp_path, *near_arguments, script=QUICK, token="secret") as job:
            assert job.code() == 0, job.stderr
        assert far.code() == 0, far.stderr
    assert stands(tmp_path) == {0: 5, 1: 5}


def free_port() -> int:
    """None of those that the kernel gives: who dials one of them before anybody listens may be given it, and reach itself."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--join", "a:1", "--stages", "2", "x"], ["--join", "--stages"]),
        (["--join", "a:1", "--coordinator", "b:1", "x"], ["--join", "--coordinator"]),
        (["--join", "a:1", "--heartbeat", "5", "x"], ["--join", "--heartbeat"]),
        (["--stages", "2", "--workers", "2", "x"], ["--workers", "--coordinator"]),
        (["--stages", "2", "--coordinator", "a:1", "--workers", "2", "--spares", "1", "x"], ["--workers", "--spares"]),
        (["--stages", "0", "x"], ["--stages"]),
        (["--stages", "2", "--heartbeat", "0", "x"], ["--heartbeat"]),
        (["--stages", "2", "--coordinator", "1234", "x"], ["--coordinator"]),
        (["--stages", "2"], ["SCRIPT"]),
        (["x"], ["--stages"]),
        (["--stages", "2", "--coordinator", "a:1", "x"], ["--coordinator", "ELASTICKPT_TOKEN"]),
        (["--stages", "2", "no-such-file.py"], ["no-such-file.py"]),
    ],
)
def test_bad_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], named: list[str]
) -> None:
    """[CLI-90, CLI-91]"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ELASTICKPT_TOKEN", raising=False)
    (tmp_path / "x").touch()
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert [name for name in named if name not in stderr.splitlines()[-1]] == []


@pytest.mark.parametrize("flag", ["--events", "--log-dir"])
def test_where_nothing_can_be_written_no_job_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    """[CLI-90]"""
    (tmp_path / "x").touch()
    assert main(["--stages", "2", flag, f"{tmp_path}/x/y", f"{tmp_path}/x"]) == 1
    assert f"{flag} {tmp_path}/x/y: cannot be" in capsys.readouterr().err


def test_limits_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """[REC-33]"""
    assert main(["--limits", "--heartbeat", "2.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("heartbeat") and "2.5 s" in line and "--heartbeat" in line for line in lines)
    assert all(len(line.split()) > 3 for line in lines)
    assert view_saves.LEFT_LIMIT_S == OLD_SAVES_S


def test_help_comes_at_once_without_torch() -> None:
    code = (
        "import sys; from elastickpt.cli.launch import main; main(['--limits']); "
        "print([m for m in sys.modules if m in ('torch', 'zarr', 'numpy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
