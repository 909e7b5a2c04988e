"""Saves beside training in one process: what a handle says, limits, growth, forks, and the end of the process."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import elastickpt as ek
from elastickpt.commit import committer
from elastickpt.commit.attempt import RunDestination
from elastickpt.commit.draft import begin, mark, marked, new_draft
from elastickpt.errors import DeadlineExceeded, NoSpace, PathOccupied, Refused, SaveSkipped, Superseded, WriterLost
from elastickpt.ranks.addresses import listen
from elastickpt.ranks.process_group import job_group
from elastickpt.saving import async_save
from elastickpt.saving.async_save import close_all, saver_of
from elastickpt.saving.pipeline import Pipeline
from elastickpt.saving.request import Placing, Request
from elastickpt.saving.saver import Saver
from elastickpt.storage.local import LocalStore
from elastickpt.storage.memory import MemoryStore
from elastickpt.testing.faults import CallAt, FaultyStore
from elastickpt.writer.share import Share
from elastickpt.writer.supervisor import Supervisor

LIMIT_S = 60.0
THREAD = ek.AsyncOptions(executor="thread")


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    close_all()


def state(value: float = 1.0, *, numbers: int = 5000) -> dict[str, Any]:
    return {"t": torch.full((numbers,), value), "strided": torch.arange(24.0).reshape(4, 6).t(), "note": {"value": value}}


def loaded(path: str | Path) -> float:
    live = state(0.0)
    ek.load(live, path)
    assert float(live["t"][-1]) == live["note"]["value"]
    return float(live["t"][0])


@pytest.mark.parametrize("options", [ek.AsyncOptions(), THREAD])
def test_what_changes_after_the_call_is_not_in_the_checkpoint(tmp_path: Path, options: ek.AsyncOptions) -> None:
    """[SAVE-35]"""
    live = state(1.0)
    handles = []
    for number in range(3):
        live["t"].fill_(number)
        live["note"]["value"] = number
        handles.append(ek.async_save(live, tmp_path / str(number), step=number, options=options))
        handles[-1].wait_staged()
        live["t"].fill_(-1)
        live["note"]["value"] = -1
    for number, handle in enumerate(handles):
        info = handle.result(LIMIT_S)
        assert (info.step, info.path, loaded(info.path)) == (number, str(tmp_path / str(number)), number)
        assert (handle.done(), handle.exception(0)) == (True, None)
        assert ek.open(info.path).verify().sound
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2"]


def test_a_relative_path_is_that_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    handle = ek.async_save(state(), "c", options=THREAD)
    os.chdir("/")
    assert handle.result(LIMIT_S).path == str(tmp_path / "c")


def test_what_cannot_be_saved_is_said_by_the_handle(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x").write_text("x")
    for path, more, error in ((tmp_path / "c", {}, PathOccupied), (tmp_path / "d", {"f": print}, Refused), ("", {}, Refused)):
        handle = ek.async_save({**state(), **more}, path, options=THREAD)
        with pytest.raises(error):
            handle.result(LIMIT_S)
        assert isinstance(handle.exception(), error)
    assert ek.async_save(state(), tmp_path / "d", options=THREAD).result(LIMIT_S).path == str(tmp_path / "d")


def test_a_callback_is_called_once_however_late_it_comes(tmp_path: Path) -> None:
    called: list[str] = []
    handle = ek.async_save(state(), tmp_path / "c", options=THREAD)
    handle.add_done_callback(lambda h: called.append(h.path))
    handle.add_done_callback(lambda h: called.append(1 / 0))  # type: ignore[arg-type]  # is logged, and hurts nobody
    handle.result(LIMIT_S)
    handle.add_done_callback(lambda h: called.append("late"))
    close_all()
    assert called == [str(tmp_path / "c"), "late"]


class Slow:
    """Storage on which reads of the token wait until they are let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from elastickpt.saving import beside

        self.let, real = threading.Event(), beside.require_token

        def waiting(*args: Any) -> None:
            self.let.wait(LIMIT_S)
            real(*args)

        monkeypatch.setattr(beside, "require_token", waiting)


def test_no_fault_of_storage_keeps_training_longer_than_the_limit(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[SAVE-9]"""
    tmp_path = memory_path
    options = ek.AsyncOptions(executor="thread", stall_limit_s=1.0)
    ek.async_save(state(), tmp_path / "known", options=options).result(LIMIT_S)
    slow = Slow(monkeypatch)
    first = ek.async_save(state(1.0), tmp_path / "first", options=options)
    second = ek.async_save(state(2.0), tmp_path / "second", options=options)
    with pytest.raises(DeadlineExceeded, match="first: the save is still under way after 0 s"):
        first.result(0)
    slow.let.set()
    with pytest.raises(SaveSkipped, match=r"none of the 1 staging arenas of this rank became free within 1 s"):
        second.result(LIMIT_S)
    assert loaded(first.result(LIMIT_S).path) == 1.0
    assert loaded(ek.async_save(state(3.0), tmp_path / "second", options=options).result(LIMIT_S).path) == 3.0
    assert saver_of(job_group(None), options).skipped == 1


def test_storage_that_decides_nothing_is_not_filled_with_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[SAVE-101]"""
    ek.async_save(state(), tmp_path / "known", options=THREAD).result(LIMIT_S)
    let, real = threading.Event(), committer.commit

    def waiting(*args: Any, **options: Any) -> Any:
        let.wait(LIMIT_S)
        return real(*args, **options)

    monkeypatch.setattr(committer, "commit", waiting)
    handles = [ek.async_save(state(), tmp_path / f"{number}", options=THREAD) for number in range(6)]
    with pytest.raises(SaveSkipped, match="5 earlier saves are under way and not decided yet"):
        handles[5].result(LIMIT_S)
    let.set()
    for handle in handles[:5]:
        handle.result(LIMIT_S)
    ek.async_save(state(), tmp_path / "next", options=THREAD).result(LIMIT_S)


def test_a_blocking_save_to_a_path_under_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ek.async_save(state(), tmp_path / "known", options=THREAD).result(LIMIT_S)
    slow = Slow(monkeypatch)
    handle = ek.async_save(state(), tmp_path / "c", options=THREAD)
    with pytest.raises(Refused, match="c: a save to it is still under way"):
        ek.save(state(), tmp_path / "c")
    ek.save(state(), tmp_path / "other")
    slow.let.set()
    handle.result(LIMIT_S)


def resources() -> dict[str, int]:
    gc.collect()
    memfds = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            memfds += "memfd:elastickpt" in os.readlink(f"/proc/self/fd/{name}")
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return {"fds": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(), "memfds": memfds, "rss": rss}


def test_nothing_grows_over_fifty_saves_and_loads_that_block(tmp_path: Path) -> None:
    live = {"t": torch.ones(1 << 20), "v": [1, {"a": 2.0}]}

    def save(number: int) -> None:
        ek.save(live, tmp_path / str(number), durability="process")
        ek.load(live, tmp_path / str(number))

    for number in range(5):
        save(number)
    before = resources()
    for number in range(5, 55):
        save(number)
    after = resources()
    assert {key: after[key] for key in ("fds", "threads")} == {key: before[key] for key in ("fds", "threads")}
    assert after["rss"] - before["rss"] < 16 << 20  # four of its arrays


def test_nothing_grows_over_fifty_saves(tmp_path: Path) -> None:
    others = resources()["memfds"]
    live = state(numbers=1 << 20)  # 4 MiB: a copy kept each time would show
    other = {"small": torch.ones(3)}  # a second structure in turn

    def save(number: int) -> None:
        for name, one in (("a", live), ("b", other)):
            ek.async_save(one, tmp_path / f"{name}{number}", durability="process").result(LIMIT_S)

    for number in range(5):
        save(number)
    before = resources()
    for number in range(5, 30):
        save(number)
    after = resources()
    assert {key: after[key] for key in ("fds", "threads", "memfds")} == {
        key: before[key] for key in ("fds", "threads", "memfds")
    }
    assert before["memfds"] == others + 2 + 1  # an arena and its mapping, and what the writer says on stderr
    assert after["rss"] - before["rss"] < 16 << 20


def test_a_state_that_grows_gets_a_larger_arena_and_frees_the_old_one(tmp_path: Path) -> None:
    others = resources()["memfds"]
    for number, numbers in enumerate((1000, 5000, 300_000, 1000)):
        path = ek.async_save(state(3.0, numbers=numbers), tmp_path / str(number), options=THREAD).result(LIMIT_S).path
        assert ek.open(path).verify().sound
    assert resources()["memfds"] == others + 2
    close_all()
    assert resources()["memfds"] <= others


@pytest.mark.parametrize("executor", ["process", "thread"])
def test_saves_in_rounds_leave_no_marks(tmp_path: Path, executor: Any) -> None:
    """[SAVE-86] A mark that stays keeps drafts from being swept, and the next job waiting."""
    options = ek.AsyncOptions(executor=executor, arena_nbytes=(1 << 20) + 4096)
    ek.async_save(state(numbers=1 << 20), tmp_path / "c", options=options).result(LIMIT_S)
    assert marked(LocalStore(tmp_path).url) == frozenset()


def test_a_saver_whose_writer_failed_by_a_fault_of_its_own_gets_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ek.async_save(state(), tmp_path / "a").result(LIMIT_S)

    def fail(self: Supervisor, message: object) -> None:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr(Supervisor, "_heard", fail)
        with pytest.raises(WriterLost):
            ek.async_save(state(), tmp_path / "b").result(LIMIT_S)
    ek.async_save(state(3.0), tmp_path / "c").result(LIMIT_S)
    assert loaded(tmp_path / "c") == 3.0


def test_saves_that_are_agreed_on_behind_the_close_end_too(tmp_path: Path) -> None:
    saver = saver_of(job_group(None), THREAD)
    ek.async_save(state(), tmp_path / "a", options=THREAD).result(LIMIT_S)
    let = threading.Event()
    saver._rounds.put(lambda: let.wait(LIMIT_S) and None)
    handle = ek.async_save(state(), tmp_path / "b", options=THREAD)
    saver.close(limit_s=0)
    let.set()
    assert isinstance(handle.exception(LIMIT_S), Refused)
    close_all()


def test_a_callback_that_exits_keeps_no_later_save_from_its_end(tmp_path: Path) -> None:
    handle = ek.async_save(state(), tmp_path / "a", options=THREAD)
    handle.add_done_callback(lambda _: sys.exit(1))
    handle.result(LIMIT_S)
    ek.async_save(state(), tmp_path / "b", options=THREAD).result(LIMIT_S)


def test_an_interrupt_while_rounds_are_awaited_ends_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ek.AsyncOptions(executor="thread", arena_nbytes=(1 << 20) + 4096)
    live = state(numbers=1 << 20)
    ek.async_save(live, tmp_path / "a", options=options).result(LIMIT_S)
    real, handles = Saver._of_the_others, []

    def interrupted(saver: Saver, future: Any) -> Any:
        found = real(saver, future)
        if isinstance(found, Share):
            handles.extend(task.handle for task in saver_of(job_group(None), options)._open)
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "_of_the_others", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ek.async_save(live, tmp_path / "b", options=options)
    assert "interrupted: KeyboardInterrupt" in str(handles[0].exception(LIMIT_S))
    ek.async_save(live, tmp_path / "b", options=options).result(LIMIT_S)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_draft_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    draft = new_draft("c", pid=os.getpid())

    def full(_: object) -> None:
        raise NoSpace("no space left on device")

    with pytest.raises(NoSpace):
        begin(FaultyStore(store, CallAt(2, full)), draft)
    assert os.listdir(tmp_path) == []


def test_a_forked_child_keeps_no_mark_and_no_address_of_its_parents(tmp_path: Path) -> None:
    """[SAVE-86] A data loader's worker works on no attempt."""
    held = mark("file:///x", "0123456789abcdef")
    listener, address = listen(host=None)
    read, write = os.pipe()
    begun, beginning = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(beginning, b"x")
        os.read(read, 1)
        os._exit(0)
    try:
        os.read(begun, 1)
        held.close()
        listener.close()
        names = Path("/proc/net/unix").read_text()
        assert "0123456789abcdef" not in names
        assert address.removeprefix("unix:") not in names
    finally:
        os.write(write, b"x")
        os.waitpid(pid, 0)
        for descriptor in (read, write, begun, beginning):
            os.close(descriptor)


def test_a_forked_child_saves_by_itself(tmp_path: Path) -> None:
    saver = saver_of(job_group(None), THREAD)
    ek.async_save(state(), tmp_path / "parent", options=THREAD).result(LIMIT_S)
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            with pytest.raises(Refused, match="belongs to the process that made it"):
                saver.save(state(), RunDestination(MemoryStore("never"), None, 1, 1), Request("never", 1))
            assert saver_of(job_group(None), THREAD) is not saver
            saver.close()
            status = 0
        os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert ek.async_save(state(), tmp_path / "again", options=THREAD).result(LIMIT_S).path


def test_a_closed_saver_takes_nothing_more(tmp_path: Path) -> None:
    saver = saver_of(job_group(None), THREAD)
    handle = ek.async_save(state(), tmp_path / "c", options=THREAD)
    saver.close()
    assert handle.done()  # closing waited for it
    with pytest.raises(Refused, match="was closed"):
        ek.async_save(state(), tmp_path / "d", options=THREAD)
    async_save.close_all()
    ek.async_save(state(), tmp_path / "d", options=THREAD).result(LIMIT_S)


def test_the_end_of_a_process_waits_for_its_thread_that_writes(tmp_path: Path) -> None:
    code = (
        "import sys, torch, elastickpt as ek\n"
        "options = ek.AsyncOptions(executor='thread')\n"
        "ek.async_save({'t': torch.ones(8 << 20)}, sys.argv[1] + '/c', options=options)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert ek.open(tmp_path / "c").verify().sound


def test_a_save_that_is_under_way_when_the_process_ends_is_finished_by_its_writer(tmp_path: Path) -> None:
    code = (
        "import logging, os, signal, sys, time, torch, elastickpt as ek\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "options = ek.AsyncOptions(exit_limit_s=0.0)\n"
        "ek.async_save({'t': torch.ones(1000)}, sys.argv[1] + '/first', options=options).result(60)\n"
        "from elastickpt.saving.async_save import _ALONE\n"
        "saver = _ALONE.savers[options]\n"
        "os.kill(saver._yard._supervisor.pid, signal.SIGSTOP)  # so that the save is under way at the end\n"
        "print(saver._yard._supervisor.pid)\n"
        "handle = ek.async_save({'t': torch.ones(1000)}, sys.argv[1] + '/second', options=options)\n"
        "while not any(task.times.submitted for task in list(saver._open)):\n"
        "    time.sleep(0.001)  # the thread that submits needs the interpreter\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"not waiting any longer for saves under way, which are left to their writers: {tmp_path}/second" in done.stderr
    assert not (tmp_path / "second").exists()
    os.kill(int(done.stdout), signal.SIGCONT)
    until = time.monotonic() + LIMIT_S
    while not (tmp_path / "second").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    assert ek.open(tmp_path / "second").verify().sound
    assert sorted(os.listdir(tmp_path)) == ["first", "second"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"arenas": 0},
        {"arenas": True},
        {"arena_nbytes": 100},
        {"stall_limit_s": -1.0},
        {"stall_limit_s": float("nan")},
        {"exit_limit_s": "soon"},
        {"executor": "fibre"},
        {"copy_threads": 0},
        {"niceness": 20},
        {"io": "loud"},
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(Refused, match=f"AsyncOptions: {name} "):
        ek.AsyncOptions(**wrong)


def test_memory_beside_the_state_is_one_arena(tmp_path: Path) -> None:
    numbers = 8 << 20
    live = {"t": torch.ones(numbers)}
    options = ek.AsyncOptions(executor="thread")
    ek.async_save({"t": torch.ones(3)}, tmp_path / "warm", options=options).result(LIMIT_S)
    before = resources()["rss"]
    for number in range(3):
        ek.async_save(live, tmp_path / str(number), options=options, durability="process").result(LIMIT_S)
    assert resources()["rss"] - before <= 4 * numbers + (32 << 20)


def test_a_storage_that_hangs_within_a_round_keeps_training_no_longer_either(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[SAVE-9]"""
    from elastickpt.writer import write_files

    tmp_path = memory_path

    options = ek.AsyncOptions(executor="thread", stall_limit_s=1.0, arena_nbytes=(1 << 20) + 4096)
    live = state(numbers=1 << 20)
    ek.async_save(live, tmp_path / "known", options=options).result(LIMIT_S)
    let, real = threading.Event(), write_files.write_slices

    def hanging(*args: Any, **options: Any) -> Any:
        let.wait(LIMIT_S)
        return real(*args, **options)

    monkeypatch.setattr(write_files, "write_slices", hanging)
    handle = ek.async_save(live, tmp_path / "c", options=options)
    with pytest.raises(SaveSkipped):  # its arena is free only when nobody reads it any more
        ek.async_save(live, tmp_path / "d", options=options).result(LIMIT_S)
    let.set()
    with pytest.raises(DeadlineExceeded, match=r"nothing was written for 1 s while training waited for a portion"):
        handle.result(LIMIT_S)
    ek.async_save(live, tmp_path / "d", options=options).result(LIMIT_S)
    assert sorted(os.listdir(tmp_path)) == ["d", "known"]


def test_a_run_that_was_not_claimed_here_is_said_on_all(tmp_path: Path) -> None:
    saver = saver_of(job_group(None), THREAD)
    handle = saver.save(state(), RunDestination(LocalStore(tmp_path), None, 1, 1), Request(str(tmp_path), 1))
    with pytest.raises(Refused, match="expected the run's claim"):
        handle.result(LIMIT_S)
    assert not issubclass(Superseded, Refused)


@pytest.mark.parametrize("where", ["agree", "open", "_share"])
@pytest.mark.parametrize("arena_nbytes", [None, (1 << 20) + 4096])
def test_ranks_that_do_not_agree_keep_training_no_longer_than_the_limit(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, arena_nbytes: int | None
) -> None:
    """Wherever the rounds hang; in portions of an arena, too, of a structure that is known. [SAVE-104, SAVE-9]"""
    from elastickpt.saving import beside

    tmp_path = memory_path

    options = ek.AsyncOptions(executor="thread", stall_limit_s=1.0, arena_nbytes=arena_nbytes)
    live = state(numbers=1 << 20)
    if arena_nbytes is not None:
        ek.async_save(live, tmp_path / "known", options=options).result(LIMIT_S)
    let = threading.Event()
    owner: Any = beside.SavesBeside if where == "_share" else Pipeline
    real = getattr(owner, where)

    def hanging(*args: Any, **options: Any) -> Any:
        let.wait(LIMIT_S)
        return real(*args, **options)

    monkeypatch.setattr(owner, where, hanging)
    handle = ek.async_save(live, tmp_path / "c", options=options)
    kept = not handle.done()  # the call came back, and its rounds still hang
    monkeypatch.setattr(owner, where, real)
    let.set()
    outcome = handle.exception(LIMIT_S)
    if where == "_share" and arena_nbytes is None:
        assert outcome is None  # all had agreed, and what it staged is written
    else:
        assert isinstance(outcome, SaveSkipped), outcome
        assert "did not agree within 1 s" in str(outcome)
    assert kept
    ek.async_save(live, tmp_path / "next", options=options).result(LIMIT_S)
    assert ek.open(tmp_path / "next").verify().sound
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_a_store_in_this_process_is_not_given_to_another_one() -> None:
    with pytest.raises(Refused, match=r"memory://apart: .* found this process's own memory; .*executor='thread'"):
        ek.async_save(state(), "memory://apart/c").result(LIMIT_S)
    ek.async_save(state(), "memory://apart/c", options=THREAD).result(LIMIT_S)


def test_a_folder_with_another_placement_is_asked_about_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[SAVE-31]"""
    for folder in ("plain", "packed"):
        (tmp_path / folder).mkdir()

    def choose(asked: Any, store: Any, **_: Any) -> Placing:
        return Placing("packed", "it is told so") if store.url.endswith("packed") else Placing("plain")

    monkeypatch.setattr("elastickpt.saving.agree.choose", choose)
    for name in ("plain/1", "plain/2", "packed/1", "packed/2", "plain/3"):
        info = ek.async_save(state(3.0), tmp_path / name, options=THREAD).result(LIMIT_S)
        assert loaded(info.path) == 3.0
        assert ek.open(info.path).manifest.placement == name.partition("/")[0]
