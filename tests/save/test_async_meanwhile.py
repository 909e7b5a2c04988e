"""A large state is written while it is staged: what may go wrong in between. [SAVE-35, SAVE-92, SAVE-102, SAVE-103]"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import elastickpt as ek
from elastickpt.errors import CheckpointError, MissingFile, NoSpace, RanksFailed, WriterLost
from elastickpt.ranks.process_group import job_group
from elastickpt.saving import saver as saver_module
from elastickpt.saving import staging
from elastickpt.saving.async_save import close_all, saver_of
from elastickpt.writer.arena import Arena
from elastickpt.writer.child import Child
from elastickpt.writer.submissions import Submission
from elastickpt.writer.supervisor import Supervisor
from tools.gloo_ranks import spawn_ranks

PART_NBYTES = 1 << 16
BOUND_S = 60.0
NUMBERS = 1 << 20
NBYTES = 4 * NUMBERS
HALF = NBYTES // 2


class Filling:
    """From now on saves are written while they are staged; `then` happens once in each, when `reached` bytes are staged.

    Without it the thread that stages waits there until it is `let`.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, reached: int, then: Callable[[], object] | None = None) -> None:
        patch.setattr(saver_module, "MEANWHILE_NBYTES", 0)
        patch.setattr(staging, "PART_NBYTES", PART_NBYTES)
        self.reached, self.let = threading.Event(), threading.Event()
        self.then, real = then, Arena.fill_to

        def fill_to(arena: Arena, nbytes: int) -> None:
            before = arena.filled
            real(arena, nbytes)
            if before < reached <= nbytes:
                self.reached.set()
                if self.then is None:
                    self.let.wait(BOUND_S)
                else:
                    self.then()

        patch.setattr(Arena, "fill_to", fill_to)


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    close_all()


def state(value: float = 1.0) -> dict[str, Any]:
    """Two arrays, the second of which is staged, and written, behind the first."""
    return {"t": {"a": torch.full((NUMBERS // 2,), value), "b": torch.full((NUMBERS // 2,), value)}, "note": value}


def demand(path: Path, value: float) -> None:
    live = state(0.0)
    ek.load(live, path)
    assert live["note"] == value
    assert all(bool((tensor == value).all()) for tensor in live["t"].values())
    assert ek.open(path).verify().sound


def until(true: Callable[[], object], what: str) -> None:
    limit = time.monotonic() + BOUND_S
    while not true():
        assert time.monotonic() < limit, what
        time.sleep(0.005)


class Saving:
    """A save on a thread of its own, as it does not return before it has staged."""

    def __init__(self, live: dict[str, Any], path: Path) -> None:
        self.handle: ek.SaveHandle | None = None
        self.raised: BaseException | None = None

        def save() -> None:
            try:
                self.handle = ek.async_save(live, path)
            except BaseException as error:
                self.raised = error

        self.thread = threading.Thread(target=save)
        self.thread.start()

    def result(self) -> ek.CheckpointInfo:
        self.thread.join(BOUND_S)
        assert self.handle is not None
        return self.handle.result(BOUND_S)


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """The structure is known, and its arena there."""
    ek.async_save(state(1.0), tmp_path / "before").result(BOUND_S)
    return tmp_path


def test_what_is_staged_is_written_while_the_rest_is_not(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filling = Filling(monkeypatch, reached=HALF)
    live = state(2.0)
    saving = Saving(live, known / "c")
    assert filling.reached.wait(BOUND_S)
    twos = torch.full((64,), 2.0).numpy().tobytes()
    until(lambda: any(twos in path.read_bytes() for path in known.rglob("c*") if path.is_file()), "bytes of it in a file")
    assert saving.thread.is_alive()
    assert not (known / "c").exists()
    filling.let.set()
    info = saving.result()
    assert info.stall_s + info.plan_s + info.write_s + info.commit_s > 0
    demand(known / "c", 2.0)


def test_what_changes_after_the_call_is_not_in_the_checkpoint(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[SAVE-35]"""
    live = state(2.0)
    Filling(monkeypatch, reached=HALF, then=lambda: time.sleep(0.1))  # so that the writer is behind the copy, and waits
    handles = []
    for number in range(3):
        for tensor in live["t"].values():
            tensor.fill_(number)
        live["note"] = float(number)
        handles.append(ek.async_save(live, known / str(number)))
        for tensor in live["t"].values():
            tensor.fill_(-1)
    for number, handle in enumerate(handles):
        handle.result(BOUND_S)
        demand(known / str(number), float(number))


def test_a_copy_that_fails_behind_the_opening_ends_the_attempt(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[SAVE-94]"""
    opened = threading.Event()

    def fail() -> None:
        assert opened.wait(BOUND_S)
        raise NoSpace("no memory for what is copied")

    with monkeypatch.context() as patch:
        watch_submissions(patch, opened)
        Filling(patch, reached=HALF, then=fail)
        handle = ek.async_save(state(2.0), known / "c")
        assert isinstance(handle.exception(BOUND_S), NoSpace)
    assert sorted(os.listdir(known)) == ["before"]
    ek.async_save(state(3.0), known / "c").result(BOUND_S)
    demand(known / "c", 3.0)


def watch_submissions(patch: pytest.MonkeyPatch, submitted: threading.Event) -> None:
    real = Supervisor.submit

    def submit(self: Supervisor, *args: Any) -> Any:
        found = real(self, *args)
        submitted.set()
        return found

    patch.setattr(Supervisor, "submit", submit)


@pytest.mark.parametrize("when", ["before the rounds", "behind the opening"])
def test_an_interrupt_while_it_is_copied_ends_the_save(known: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    submitted, handles = threading.Event(), []

    def interrupt() -> None:
        handles.extend(task.handle for task in saver_of(job_group(None), ek.AsyncOptions())._open)
        if when == "behind the opening":
            assert submitted.wait(BOUND_S)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watch_submissions(patch, submitted)
        Filling(patch, reached=HALF, then=interrupt)
        with pytest.raises(KeyboardInterrupt):
            ek.async_save(state(2.0), known / "c")
    assert "interrupted: KeyboardInterrupt" in str(handles[0].exception(BOUND_S))
    assert sorted(os.listdir(known)) == ["before"]
    ek.async_save(state(3.0), known / "c").result(BOUND_S)
    demand(known / "c", 3.0)


def test_an_arena_of_a_save_that_failed_is_free_once_it_is_filled(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[SAVE-92]"""
    with monkeypatch.context() as patch:
        filling = Filling(patch, reached=HALF)
        saving = Saving(state(2.0), known / "c")
        assert filling.reached.wait(BOUND_S)
        until(lambda: [path for path in known.iterdir() if path.name != "before"], "a draft")
        for path in known.iterdir():
            if path.name != "before":
                shutil.rmtree(path, ignore_errors=True)
        (slot,) = saver_of(job_group(None), ek.AsyncOptions())._arenas._slots
        time.sleep(0.2)  # its writer finds out meanwhile
        assert slot.taken
        filling.let.set()
        with pytest.raises(CheckpointError) as raised:
            saving.result()
        assert isinstance(raised.value, MissingFile | WriterLost) or raised.value.report
    until(lambda: not slot.taken, "it is free then")
    ek.async_save(state(3.0), known / "d").result(BOUND_S)
    demand(known / "d", 3.0)


def test_a_writer_that_is_killed_while_the_trainer_copies_is_replaced(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[SAVE-95]"""
    filling = Filling(monkeypatch, reached=HALF)
    saving = Saving(state(2.0), known / "c")
    assert filling.reached.wait(BOUND_S)
    writer = saver_of(job_group(None), ek.AsyncOptions())._yard._supervisor
    assert writer is not None
    time.sleep(0.1)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    until(lambda: writer.deaths, "its death was noticed")
    filling.let.set()
    saving.result()
    demand(known / "c", 2.0)


# -- trainers that end -------------------------------------------------------------------------------------------------


def dies_while_it_copies(rank: int, world_size: int, root: str) -> str:
    """Rank 1 ends in the middle of its copy, when its writer was told of the save. What rank 0 sees."""
    mesh = init_device_mesh("cpu", (world_size,))

    def sharded(value: float) -> dict[str, Any]:
        return {"t": {name: distribute_tensor(one, mesh, [Shard(0)]) for name, one in state(value)["t"].items()}, "note": value}

    ek.async_save(sharded(1.0), f"{root}/before").result(BOUND_S)

    handed, real = threading.Event(), Child.hand

    def hand(child: Child, submission: Submission) -> None:
        real(child, submission)
        handed.set()

    def die() -> None:
        if rank == 1:
            assert handed.wait(BOUND_S)
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "hand", hand)
        Filling(patch, reached=HALF // 2, then=die)
        handle = ek.async_save(sharded(2.0), f"{root}/c")
        error = handle.exception(BOUND_S)
    assert isinstance(error, RanksFailed), repr(error)
    return "; ".join(f"{failure.rank} {failure.kind} {failure.message}" for failure in error.report)


def test_a_trainer_that_is_killed_while_it_copies_ends_the_attempt_on_all(tmp_path: Path) -> None:
    """[SAVE-103]"""
    with spawn_ranks(dies_while_it_copies, 2, str(tmp_path)) as ranks:
        first, second = ranks.wait()
    assert second.status == -signal.SIGKILL
    assert first.error is None, first
    assert first.value == "1 rank-lost the trainer ended before it had staged the rest"
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
    demand(tmp_path / "before", 1.0)
    ek.async_save(state(3.0), tmp_path / "c").result(BOUND_S)
    demand(tmp_path / "c", 3.0)


def test_little_is_staged_before_it_is_handed_over(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreeing takes longer than the copy, and both take turns on one interpreter."""
    assert NBYTES < saver_module.MEANWHILE_NBYTES
    submitted = threading.Event()
    watch_submissions(monkeypatch, submitted)
    seen: list[bool] = []
    limits = iter((0.2, BOUND_S))
    with monkeypatch.context() as patch:
        filling = Filling(patch, reached=HALF, then=lambda: seen.append(submitted.wait(next(limits))))
        patch.setattr(saver_module, "MEANWHILE_NBYTES", NBYTES * 2)
        ek.async_save(state(2.0), known / "c").result(BOUND_S)
        submitted.clear()
        patch.setattr(saver_module, "MEANWHILE_NBYTES", NBYTES)
        ek.async_save(state(3.0), known / "d").result(BOUND_S)
    assert filling.reached.is_set()
    assert seen == [False, True]
