"""`inspect` and `verify` of a run, and of a checkpoint that is named by its step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_actors import by

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.cli.run_facts import layout_text, run_facts
from elastickpt.cli.run_text import run_lines
from elastickpt.cli.text import age_text
from elastickpt.format.arrays import Mesh
from elastickpt.ledger.branch import point_latest
from elastickpt.ledger.epochs import claim, start
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import Found, PassedOver
from elastickpt.loading.checkpoint import Checkpoint
from elastickpt.loading.verify import VerifyReport
from elastickpt.runs.opening import run_at
from elastickpt.storage.local import LocalStore

Answer = Callable[..., tuple[int, dict[str, object]]]
Captured = pytest.CaptureFixture[str]
LIVE = [(40, 2), (30, 2), (20, 1), (10, 1)]


def rows(capsys: Captured, *argv: object, code: int = 0) -> list[list[str]]:
    """The words of each line of a command that has nothing to say on stderr."""
    assert main([*map(str, argv)]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return [line.split() for line in out.splitlines()]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def test_the_json_lists_the_live_branch_and_then_what_is_abandoned(whole_run: Path, json_of: Answer) -> None:
    """[CLI-14, CLI-27]"""
    code, answer = json_of("inspect", whole_run)
    found = answer["checkpoints"]
    assert code == 0
    assert [(one["step"], one["epoch"], one["state"]) for one in found] == [
        *((step, epoch, "live") for step, epoch in LIVE),
        (30, 1, "abandoned"),
    ]
    assert answer["total"] == {"checkpoints": 5, "live": 4, "abandoned": 1, "damaged": 0, "nbytes": 5000 + 130}
    assert (answer["keep"], [one["found"] for one in found]) == (None, [None] * 5)
    assert [one["metrics"]["loss"] for one in found] == [2.75, 2.5, 2.25, 3.5, {"$float": "nan"}]
    assert [one["world_size"] for one in found] == [4, 1, 1, 1, 1]
    assert {"dp", "tp"} == {axis for mesh in found[0]["meshes"] for axis in mesh["axes"]}
    assert all((whole_run / one["folder"] / "checkpoint.json").exists() for one in found)
    assert all("kept" not in one and one["problem"] is None for one in found)
    assert "epochs" not in answer


def test_people_see_a_row_for_each_checkpoint(whole_run: Path, capsys: Captured) -> None:
    lines = rows(capsys, "inspect", whole_run)
    assert " ".join(lines[0]) == f"{whole_run} a run: 4 checkpoints on the live branch, 1 abandoned, 5.0 KiB"
    assert lines[2] == ["step", "epoch", "branch", "age", "bytes", "ranks", "layout", "metrics", "verified"]
    assert lines[3][:3] == ["40", "2", "live"]
    assert lines[3][-7:] == ["1.0", "KiB", "4", "dp2×tp2", "loss", "2.75", "-"]
    assert lines[7][:3] == ["30", "1", "abandoned"]
    assert len(lines) == 8


def test_rules_say_what_they_would_keep_and_why(whole_run: Path, json_of: Answer, capsys: Captured) -> None:
    _, answer = json_of("inspect", whole_run, "--keep", "last=1,every=20,best=loss:1")
    assert [(one["step"], one["kept"], one["reasons"]) for one in answer["checkpoints"]] == [
        (40, True, ["newest", "last 1", "every 20"]),
        (30, False, ["no rule keeps it"]),
        (20, True, ["every 20", "best 1 by loss (min)"]),
        (10, False, ["no rule keeps it"]),
        (30, False, ["no rule keeps it"]),
    ]
    lines = rows(capsys, "inspect", whole_run, "--keep", "best=loss:2:max")
    assert [line[-5:] for line in lines if line[:2] == ["10", "1"]] == [["best", "2", "by", "loss", "(max)"]]


@pytest.mark.parametrize("rules", ["", "last", "last=x", "last=0", "first=3", "last=1,last=2", "best=loss:0", "max_age_s=-1"])
def test_rules_that_mean_nothing_are_bad_usage(rules: str, whole_run: Path, capsys: Captured) -> None:
    assert main(["inspect", str(whole_run), "--keep", rules]) == 2
    assert "best=METRIC[:N[:min|max]]" in capsys.readouterr().err


def start_again(root: Path, *, continued: AttemptId | None, keep: str | None, passed: tuple[PassedOver, ...] = ()) -> None:
    """Epoch 4 starts, and tells what it found and what it keeps."""
    store = LocalStore(root)
    holding = complete(claim(store, by(4)))
    found = Found(1000.5, continued is not None, passed)
    complete(start(store, holding, continued=continued, keep=keep, found=found))


BAD = PassedOver(AttemptId(40, 2, 1), "checksum-mismatch", "params/w/c.0: block 3\n  rank 1")


def test_people_see_what_restores_found(llama: Path, capsys: Captured, json_of: Answer) -> None:
    """[CLI-29]"""
    unread = PassedOver(AttemptId(30, 2, 1), "storage-failed", "stale handle")
    start_again(llama, continued=AttemptId(20, 1, 1), keep=None, passed=(BAD, unread))
    lines = rows(capsys, "inspect", llama)
    assert " ".join(lines[0]).endswith(" a run: 2 checkpoints on the live branch, 3 abandoned, 1 damaged, 5.0 KiB")
    assert lines[2][-2:] == ["verified", "problem"]
    shown = {(line[0], line[1]): " ".join(line) for line in lines[3:]}
    assert shown["20", "1"].endswith(" at epoch 4's restore")
    assert shown["10", "1"].endswith(" -")
    assert shown["40", "2"].endswith(" damaged: checksum-mismatch epoch 4 passed it over: params/w/c.0: block 3 rank 1")
    assert shown["30", "2"].endswith(" unread: storage-failed epoch 4 passed it over: stale handle")
    _, answer = json_of("inspect", llama)
    found = {(one["step"], one["epoch"]): one["found"] for one in answer["checkpoints"]}
    at = {"epoch": 4, "time": 1000.5}
    assert found == {
        (20, 1): {"outcome": "verified", **at, "kind": None, "message": None},
        (10, 1): None,
        (40, 2): {"outcome": "damaged", **at, "kind": BAD.kind, "message": BAD.message},
        (30, 2): {"outcome": "unread", **at, "kind": "storage-failed", "message": "stale handle"},
        (30, 1): None,
    }
    assert (answer["total"]["damaged"], [one["problem"] for one in answer["checkpoints"]]) == (1, [None] * 5)


def test_a_step_that_is_damaged_stands_out_on_a_terminal(llama: Path) -> None:
    start_again(llama, continued=AttemptId(20, 1, 1), keep=None, passed=(BAD,))
    run = run_at(str(llama))
    assert run is not None
    lines = list(run_lines(run_facts(run, now=2000.0, keep=None, epochs=False), width=None))
    styles = {line[1].text.strip(): line[1].style for line in lines[3:]}
    assert (styles["40"], styles["20"]) == ("bold red", "bold")


def test_the_rules_of_the_newest_job_say_what_it_keeps_and_others_override_them(
    llama: Path, json_of: Answer, capsys: Captured
) -> None:
    """A commit that was found damaged takes no good one's place here either. [CLI-34]"""
    start_again(llama, continued=AttemptId(40, 2, 1), keep="last=1,best=loss:1:min")
    complete(claim(LocalStore(llama), by(5)))  # it has not started
    _, answer = json_of("inspect", llama)
    assert answer["keep"] == {"rules": "last=1,best=loss:1:min", "epoch": 4}
    assert [(one["step"], one["epoch"], one["kept"]) for one in answer["checkpoints"]] == [
        *((40, 2, True), (30, 2, False), (20, 1, True), (10, 1, False)),
        (30, 1, False),
    ]
    lines = rows(capsys, "inspect", llama)
    assert " ".join(lines[1]) == "keeps last=1,best=loss:1:min the rules of epoch 4"
    (newest,) = (" ".join(line) for line in lines if line[:2] == ["40", "2"])
    assert newest.endswith(" at epoch 4's restore yes: newest, last 1, newest that was verified")
    _, answer = json_of("inspect", llama, "--keep", "every=30")
    assert answer["keep"] == {"rules": "every=30", "epoch": None}
    assert [one["step"] for one in answer["checkpoints"] if one["kept"]] == [40, 30]
    assert rows(capsys, "inspect", llama, "--keep", "every=30")[1] == []


def test_a_job_without_rules_keeps_all(llama: Path, json_of: Answer, capsys: Captured) -> None:
    start_again(llama, continued=AttemptId(40, 2, 1), keep="all")
    _, answer = json_of("inspect", llama)
    assert answer["keep"] == {"rules": "all", "epoch": 4}
    assert all(one["kept"] for one in answer["checkpoints"])
    lines = rows(capsys, "inspect", llama)
    assert [line[-2:] for line in lines[4:]] == [["all", "kept"]] * 5


def test_rules_of_a_later_release_are_shown_and_not_guessed_at(llama: Path, json_of: Answer, capsys: Captured) -> None:
    """[CLI-34]"""
    start_again(llama, continued=AttemptId(40, 2, 1), keep="last=1,newest_weekly=4")
    _, answer = json_of("inspect", llama)
    assert answer["keep"] == {"rules": "last=1,newest_weekly=4", "epoch": 4}
    assert all("kept" not in one for one in answer["checkpoints"])
    words = " ".join(rows(capsys, "inspect", llama)[1])
    assert words == "keeps last=1,newest_weekly=4 the rules of epoch 4; this release does not understand them"


def test_after_a_fallback_the_damaged_step_and_the_restored_one_are_told_apart(
    tmp_path: Path, json_of: Answer, capsys: Captured
) -> None:
    """By real jobs. Looking changes nothing. [CLI-29, CLI-34]"""
    weight = torch.zeros(300)
    for steps, damaged in (((10, 20), "step-0000000020.1.1/extra/w/c.0"), ((15,), "")):
        with ek.Run(tmp_path / "run", {"w": weight}, keep=ek.Keep(last=2), options=ek.RunOptions(signals={})) as run:
            run.restore()
            for step in steps:
                run.save(step).result(60.0)
        if damaged:
            flip(tmp_path / "run" / damaged)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, answer = json_of("inspect", tmp_path / "run")
    assert (code, answer["keep"]) == (0, {"rules": "last=2", "epoch": 2})
    told = [(one["step"], one["state"], one["found"] and one["found"]["outcome"]) for one in answer["checkpoints"]]
    assert told == [(15, "live", None), (10, "live", "verified"), (20, "abandoned", "damaged")]
    assert "extra/w/c.0: block 0" in answer["checkpoints"][2]["found"]["message"]
    lines = rows(capsys, "inspect", tmp_path / "run")
    assert [line[8:12] for line in lines[4:6]] == [["-", "yes:", "newest,", "last"], ["at", "epoch", "2's", "restore"]]
    assert lines[6][8:10] == ["damaged:", "checksum-mismatch"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_epochs_are_shown_with_who_claimed_and_what_they_continued(whole_run: Path, json_of: Answer, capsys: Captured) -> None:
    _, answer = json_of("inspect", whole_run, "--epochs")
    found = [(one["epoch"], one["state"], one["host"], one["pid"], one["continued"]) for one in answer["epochs"]]
    assert found == [
        (3, "claimed", "host3", 103, None),
        (2, "started", "host2", 102, "step-0000000020.1.1"),
        (1, "started", "host1", 101, None),
    ]
    assert "token-1" not in str(answer)
    lines = rows(capsys, "inspect", whole_run, "--epochs")
    assert lines[-2] == ["2", "started", "1970-01-01", "00:16:40", "UTC", "host2", "102", "step", "20", "of", "epoch", "1"]
    assert lines[-1][-1] == "nothing"


def test_checkpoints_that_cannot_be_opened_are_listed_and_decide_the_code(llama: Path, json_of: Answer) -> None:
    """[CLI-26]"""
    flip(llama / "step-0000000040.2.1" / "checkpoint.json")
    shutil.rmtree(llama / "step-0000000010.1.1")
    flip(llama / "commits" / "0000000030-1-1.json")
    code, answer = json_of("inspect", llama, "--keep", "last=1")
    assert code == 3
    found = {(one["step"], one["epoch"]): one["problem"] and one["problem"]["kind"] for one in answer["checkpoints"]}
    assert found == {(40, 2): "checksum-mismatch", (30, 2): None, (20, 1): None, (10, 1): "damaged", (30, 1): "damaged"}
    kept = {(one["step"], one["epoch"]) for one in answer["checkpoints"] if one["kept"]}
    assert kept == {(40, 2), (30, 2)}  # the good one below a damaged one is the last one


def test_what_counts_is_not_guessed(llama: Path, json_of: Answer, capsys: Captured) -> None:
    flip(llama / "commits" / "epoch-2.adopted.json")
    code, answer = json_of("inspect", llama)
    assert (code, answer["error"]["kind"]) == (3, "checksum-mismatch")
    assert main(["verify", str(llama)]) == 3
    assert "epoch-2.adopted.json" in capsys.readouterr().out


def test_objects_and_manifests_are_enough(llama: Path, json_of: Answer) -> None:
    """[CLI-25]"""
    for path in llama.glob("step-*/*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "checkpoint.json":
            path.unlink()
    code, answer = json_of("inspect", llama, "--epochs")
    assert (code, len(answer["checkpoints"])) == (0, 5)


def test_a_run_without_a_checkpoint_is_an_empty_list(tmp_path: Path, llama: Path, json_of: Answer) -> None:
    (tmp_path / "new" / "commits").mkdir(parents=True)
    shutil.copy(llama / "commits" / "epoch-1.json", tmp_path / "new" / "commits")
    assert json_of("inspect", tmp_path / "new")[1]["checkpoints"] == []
    assert json_of("verify", tmp_path / "new")[0] == 1


@pytest.mark.parametrize(
    ("of", "option"),
    [
        *(("run", option) for option in (["--values"], ["--name", "x"], ["--format", "table"], ["--all"], ["--fragments"])),
        *(("checkpoint", option) for option in (["--epochs"], ["--keep", "last=1"])),
    ],
)
def test_options_of_the_other_kind_are_bad_usage(of: str, option: list[str], whole_run: Path, capsys: Captured) -> None:
    """[CLI-28]"""
    path = str(whole_run) + ("" if of == "run" else "@10")
    assert main(["inspect", path, *option]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {path}: {option[0]}: ")


def test_a_step_of_a_run_is_a_path(whole_run: Path, json_of: Answer, capsys: Captured) -> None:
    for at, attempt in (("@10", (10, 1)), ("@30", (30, 2)), ("@30.1", (30, 1)), ("@latest", (40, 2))):
        code, answer = json_of("inspect", f"{whole_run}{at}")
        assert (code, answer["step"], answer["path"]) == (0, attempt[0], f"{whole_run}{at}")
        folder = whole_run / f"step-{attempt[0]:010d}.{attempt[1]}.1"
        assert ek.open(f"{whole_run}{at}").path == answer["place"] == str(folder)
    assert ["folder", str(whole_run / "step-0000000030.1.1")] in rows(capsys, "inspect", f"{whole_run}@30.1")
    code, answer = json_of("inspect", f"{whole_run}@25")
    assert (code, answer["error"]["kind"]) == (1, "not-a-checkpoint")
    assert "has 40, 30, 20, 10" in answer["error"]["message"]


def test_a_path_that_stands_as_it_is_written_wins(whole_run: Path, json_of: Answer) -> None:
    """[CLI-13]"""
    beside = whole_run.parent / "llama@30"
    os.symlink(whole_run / "step-0000000010.1.1", beside)
    try:
        assert json_of("inspect", beside)[1]["step"] == 10
    finally:
        beside.unlink()
    assert json_of("inspect", beside)[1]["step"] == 30


def test_verify_of_a_run_is_of_all_that_counts(llama: Path, json_of: Answer) -> None:
    """[CLI-33]"""
    code, answer = json_of("verify", llama)
    assert code == 0
    assert [one["path"] for one in answer["checkpoints"]] == [f"{llama}@{step}.{epoch}" for step, epoch in [*LIVE, (30, 1)]]
    flip(next((llama / "step-0000000030.1.1").rglob("c.0")))
    shutil.copy(llama / "step-0000000010.1.1" / "checkpoint.json", llama / "step-0000000020.1.1" / "checkpoint.json")
    code, answer = json_of("verify", llama)
    assert code == 3
    assert [one["status"] for one in answer["checkpoints"]] == ["sound", "sound", "damaged", "sound", "damaged"]
    assert "in its register" in answer["checkpoints"][2]["problems"][0]["message"]


def test_what_retention_removes_meanwhile_is_no_damage(
    llama: Path, json_of: Answer, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[CLI-33]"""
    verify = Checkpoint.verify

    def slow(self: Checkpoint, **options: Any) -> VerifyReport:
        if "step-0000000030.2.1" in self.path:
            for name in ("commits/0000000030-2-1.json", "commits/0000000010-1-1.json"):
                (llama / name).unlink()
            for name in ("step-0000000030.2.1", "step-0000000010.1.1"):
                shutil.rmtree(llama / name)
        return verify(self, **options)

    monkeypatch.setattr(Checkpoint, "verify", slow)
    assert main(["verify", str(llama)]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0:2] for line in out.splitlines()] == [["sound", f"{llama}@{at}"] for at in ("40.2", "20.1", "30.1")]
    assert err.splitlines() == [f"note: {llama}@{at}: removed from its run meanwhile" for at in ("30.2", "10.1")]


def test_the_link_for_people_is_no_obstacle(llama: Path, json_of: Answer) -> None:
    complete(point_latest(LocalStore(llama)))
    assert json_of("inspect", llama)[1]["total"]["checkpoints"] == 5
    assert json_of("inspect", llama / "latest")[1]["step"] == 40
    (llama / "step-0000000040.2.1" / "stray").write_bytes(b"")
    code, answer = json_of("verify", llama / "latest")
    assert (code, [one["kind"] for one in answer["checkpoints"][0]["problems"]]) == (3, ["stray-file"])


def test_meshes_in_short() -> None:
    whole = Mesh("dp.tp", ("dp", "tp"), (2, 2), (0, 1, 2, 3))
    part = Mesh("dp@0-2", ("dp",), (2,), (0, 2))
    other = Mesh("dp@1-3", ("dp",), (2,), (1, 3))
    assert layout_text((part, whole, other)) == "dp2×tp2"
    assert layout_text((part, other)) == "2 of dp2"
    assert layout_text((whole, Mesh("ep", ("ep",), (4,), (0, 1, 2, 3)))) == "dp2×tp2, ep4"
    assert layout_text(()) == ""


def test_ages_in_short() -> None:
    found = [age_text(seconds) for seconds in (-5, 0, 99, 100, 5940, 6000, 172000, 180000, 8.64e7)]
    assert found == ["0 s", "0 s", "99 s", "2 min", "99 min", "1.7 h", "47.8 h", "2.1 d", "1,000.0 d"]
