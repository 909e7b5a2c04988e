"""Real writer processes: killed, stopped, abandoned, and what becomes of the save that they had."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from staged import Rank, begun, big_state, commit, save_through, tree
from trainer import BOUND_S, state_of, trains
from writer_faults import hook

import elastickpt as ek
from elastickpt.errors import CheckpointError, DeadlineExceeded, MissingFile, Refused, WriterLost
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_fragments import decode_fragments
from elastickpt.format.keys import fragments_file
from elastickpt.format.records import FileDigest
from elastickpt.saving.staging import Stager
from elastickpt.storage.local import LocalStore
from elastickpt.writer import child as child_module
from elastickpt.writer import supervisor as supervisor_module
from elastickpt.writer.arena import Arena
from elastickpt.writer.child import Child, WriterOptions
from elastickpt.writer.messages import WriterMessage
from elastickpt.writer.submissions import Submission
from elastickpt.writer.supervisor import Supervisor
from elastickpt.writer.thread import ThreadWriter
from tools.gloo_ranks import spawn_ranks

Start = Callable[..., Supervisor]
FAST = WriterOptions(beat_s=0.1, silence_s=30.0, reap_s=30.0, lease_s=60.0)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts supervisors with FAST options changed as said, and ends them."""
    started: list[Supervisor] = []

    def begin(**changes: object) -> Supervisor:
        started.append(Supervisor(replace(FAST, **changes)))  # type: ignore[arg-type]
        return started[-1]

    yield begin
    for supervisor in started:
        supervisor.close(limit_s=5.0)


@pytest.fixture(scope="module")
def blocking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blocking") / "c"
    ek.save(big_state(), path)
    return path


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < end, f"not within {BOUND_S} s: {what}"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether no process, and no zombie, has this id."""
    return not Path(f"/proc/{pid}").exists()


def ended(pid: int) -> bool:
    """The same of an orphan, which is perhaps reaped by nobody."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def demand_equal(path: Path, blocking: Path) -> None:
    """The same files with the same bytes, but for the attempt; and sound."""
    found, expected = tree(path), tree(blocking)
    name = fragments_file(0)
    mine, theirs = (decode_fragments(files.pop(name), path=name) for files in (found, expected))
    assert replace(mine, attempt=theirs.attempt) == theirs
    assert found == expected
    assert ek.open(path).verify().sound


def submit(supervisor: Supervisor, rank: Rank, arena: Arena, path: Path) -> tuple[Submission, Callable[[], None]]:
    """A staged save on its way, and what commits it."""
    store, draft = begun(path.parent, path.name)
    arena.empty()
    Stager(rank.prepared).stage(arena, 0, rank.live.arrays)
    submission = supervisor.submit(rank.staged(draft, store, 0, b"", "power"), arena)

    def finish() -> None:
        file = submission.result(BOUND_S).file
        assert file is not None
        commit(rank, store, draft, file)

    return submission, finish


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["power", "process"])
def test_a_writer_process_writes_what_a_blocking_save_does(
    tmp_path: Path, start: Start, blocking: Path, durability: str
) -> None:
    rank = Rank.of(big_state())
    arena = rank.arena()
    save_through(start(), rank, arena, tmp_path / "c", durability=durability)  # type: ignore[arg-type]
    demand_equal(tmp_path / "c", blocking)


def test_an_arena_smaller_than_the_state_is_used_in_rounds(tmp_path: Path, start: Start, blocking: Path) -> None:
    rank = Rank.of(big_state(), arena_nbytes=2 << 20)
    assert len(rank.prepared.portions) == 4
    supervisor = start(hooks=(hook("kill", 9), hook("kill", 9), hook("kill", 30)))
    save_through(supervisor, rank, rank.arena(), tmp_path / "c", durability="power")
    demand_equal(tmp_path / "c", blocking)


def test_a_writer_process_reaches_no_torch() -> None:
    code = (
        "import sys, elastickpt.writer.process, elastickpt.storage.opening; "
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'zarr')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_thread_writes_what_a_process_does(tmp_path: Path, blocking: Path) -> None:
    rank = Rank.of(big_state(), arena_nbytes=3 << 20)
    writer = ThreadWriter(LocalStore(tmp_path))
    save_through(writer, rank, rank.arena(), tmp_path / "c", durability="power")
    demand_equal(tmp_path / "c", blocking)
    arena = Arena.create(rank.prepared.arena_nbytes)
    store, draft = begun(tmp_path, "d")
    store.remove_tree(draft.folder)
    with pytest.raises(MissingFile):
        writer.submit(rank.staged(draft, store, 0, b"", "power"), arena).result(BOUND_S)
    writer.close()
    with pytest.raises(Refused):
        writer.submit(rank.staged(draft, store, 0, b"", "power"), arena)


def test_a_plan_and_an_arena_are_sent_once(tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    real = child_module.Wire.send

    def send(self: child_module.Wire, message: object, **kwargs: object) -> None:
        sent.append(type(message).__name__)
        real(self, message, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(child_module.Wire, "send", send)
    supervisor = start()
    rank = Rank.of(big_state())
    arena = rank.arena()
    for number in range(3):
        save_through(supervisor, rank, arena, tmp_path / str(number))
    assert sent == ["WriterSettings", "StructureHere", "ArenaHere", "Write", "Write", "Write"]


def test_the_process_has_a_session_of_its_own_and_ignores_what_ends_a_job(tmp_path: Path, start: Start) -> None:
    supervisor = start(niceness=3, io="idle")
    rank = Rank.of(big_state())
    arena = rank.arena()
    save_through(supervisor, rank, arena, tmp_path / "a")
    pid = supervisor.pid
    assert pid is not None
    assert os.getsid(pid) == pid
    process = psutil.Process(pid)
    soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
    assert soft == hard  # a committer has a connection to each member
    assert process.nice() == psutil.Process().nice() + 3
    classes = set()
    for thread in process.threads():
        with suppress(psutil.NoSuchProcess):  # threads that wrote may end meanwhile
            classes.add(psutil.Process(thread.id).ionice().ioclass)
    assert classes == {psutil.IOPRIO_CLASS_IDLE}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    save_through(supervisor, rank, arena, tmp_path / "b")
    assert supervisor.pid == pid


# -- writers that end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["1", "12/", "25", "40/", "60+", "80", "95+"])
def test_a_save_whose_writer_is_killed_is_whole(tmp_path: Path, start: Start, blocking: Path, at: str) -> None:
    """Each operation, in this process: `test_jobs`. Here the process is real."""
    supervisor = start(hooks=(hook("kill", at),))
    rank = Rank.of(big_state())
    submission, finish = submit(supervisor, rank, rank.arena(), tmp_path / "c")
    finish()
    assert submission.deaths == 1
    demand_equal(tmp_path / "c", blocking)


def test_twenty_writers_killed_in_a_row_over_one_save(tmp_path: Path, start: Start, blocking: Path) -> None:
    supervisor = start(hooks=tuple(hook("kill", n) for n in range(1, 81, 4)))
    rank = Rank.of(big_state())
    submission, finish = submit(supervisor, rank, rank.arena(), tmp_path / "c")
    finish()
    assert submission.deaths == 20
    demand_equal(tmp_path / "c", blocking)


def test_writers_killed_before_they_are_ready_do_not_end_a_save(
    tmp_path: Path, start: Start, blocking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    real = Child.spawn

    def spawn(*args: object, **kwargs: object) -> Child:
        child = real(*args, **kwargs)  # type: ignore[arg-type]
        if len(killed) < 6:
            killed.append(child.process.pid)
            child.process.kill()
        return child

    monkeypatch.setattr(Child, "spawn", spawn)
    rank = Rank.of(big_state())
    _, finish = submit(start(), rank, rank.arena(), tmp_path / "c")
    finish()
    assert len(killed) == 6
    demand_equal(tmp_path / "c", blocking)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_writers_killed_and_stopped_at_any_time(memory_path: Path, start: Start, seed: int) -> None:
    """Each save's own contents, though another one was staged into the same arena as soon as the one before had its result.

    Kills come at times up to twice what a writer needs to start and to write: faster ones than any could live leave nothing.
    """
    chosen = random.Random(seed)
    ranks = [Rank.of(big_state(4, seed=number)) for number in range(2)]
    arena = ranks[0].arena()
    for name in ("first", "undisturbed"):
        begun = time.perf_counter()
        supervisor = start(silence_s=1.0)
        save_through(supervisor, ranks[0], arena, memory_path / name, durability="power")
        life_s = time.perf_counter() - begun
    ending = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while not ending.wait(chosen.uniform(0, 2 * life_s)):
            if (pid := supervisor.pid) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, chosen.choice([signal.SIGKILL] * 5 + [signal.SIGSTOP]))
                    killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    saved = 0
    try:
        while len(killed) < 20:
            save_through(supervisor, ranks[saved % 2], arena, memory_path / str(saved), durability="power")
            saved += 1
    finally:
        ending.set()
        killer.join()
    for number in range(saved):
        opened = ek.open(memory_path / str(number))
        assert opened.verify().sound
        assert opened.values["/n"] == number % 2


def test_a_writer_killed_between_saves_is_replaced(tmp_path: Path, start: Start, blocking: Path) -> None:
    supervisor = start()
    rank = Rank.of(big_state())
    arena = rank.arena()
    save_through(supervisor, rank, arena, tmp_path / "a")
    first = supervisor.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor.pid not in (None, first), "another writer")
    assert gone(first)
    save_through(supervisor, rank, arena, tmp_path / "b")
    demand_equal(tmp_path / "b", blocking)


@pytest.mark.parametrize("at", [1, 20, 70])
def test_a_stopped_writer_is_killed_and_reaped_before_its_arena_is_used_again(
    tmp_path: Path, start: Start, blocking: Path, at: int
) -> None:
    supervisor = start(hooks=(hook("pause", at),), silence_s=1.0)
    first = supervisor.pid
    rank, other = Rank.of(big_state()), Rank.of(big_state(seed=1))
    assert rank.prepared.digest == other.prepared.digest
    arena = rank.arena()
    submission, finish = submit(supervisor, rank, arena, tmp_path / "c")
    until(lambda: supervisor.pid is not None, "a writer")
    first = first or supervisor.pid
    assert first is not None
    finish()
    assert submission.deaths >= 1  # on a busy machine others are silent, too
    assert gone(first)
    save_through(supervisor, other, arena, tmp_path / "d")
    demand_equal(tmp_path / "c", blocking)
    assert ek.open(tmp_path / "d").verify().sound


def test_an_arena_whose_writer_cannot_be_reaped_is_never_used_again(
    tmp_path: Path, start: Start, blocking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waits for a device does not die. [SAVE-92]"""
    supervisor = start(hooks=(hook("pause", 20),), silence_s=1.0)
    rank = Rank.of(big_state())
    arena = rank.arena()
    stuck: list[Child] = []
    real = Child.put_down

    def put_down(self: Child, limit_s: float) -> bool:
        if stuck:
            return real(self, limit_s)
        stuck.append(self)
        return False

    monkeypatch.setattr(Child, "put_down", put_down)
    submission, _ = submit(supervisor, rank, arena, tmp_path / "c")
    with pytest.raises(WriterLost, match=r"could not be ended \(silent for .* s\) and may still write"):
        submission.result(BOUND_S)
    assert arena.retired
    with pytest.raises(Refused, match="retired"):
        submit(supervisor, rank, arena, tmp_path / "c")
    save_through(supervisor, rank, rank.arena(), tmp_path / "d")
    demand_equal(tmp_path / "d", blocking)
    assert real(stuck[0], BOUND_S)


def test_a_writer_that_cannot_start_is_an_error_and_not_a_wait(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such library')")
    monkeypatch.setattr(child_module, "_MAIN", broken)
    supervisor = start()
    rank = Rank.of(big_state())
    arena = rank.arena()
    submission, _ = submit(supervisor, rank, arena, tmp_path / "c")
    with pytest.raises(WriterLost, match="ended before it was ready, status 1: no such library"):
        submission.result(BOUND_S)
    monkeypatch.undo()
    save_through(supervisor, rank, arena, tmp_path / "d")


# -- saves that end ----------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_its_writer_ready_for_the_next(tmp_path: Path, start: Start, blocking: Path) -> None:
    supervisor = start()
    rank = Rank.of(big_state())
    arena = rank.arena()
    store, draft = begun(tmp_path, "a")
    store.remove_tree(draft.folder)
    submission = supervisor.submit(rank.staged(draft, store, 0, b"", "power"), arena)
    with pytest.raises(MissingFile, match=r"a\.draft"):
        submission.result(BOUND_S)
    first = supervisor.pid
    save_through(supervisor, rank, arena, tmp_path / "b")
    assert supervisor.pid == first
    demand_equal(tmp_path / "b", blocking)
    assert not (tmp_path / draft.folder).exists()


def test_a_cancelled_save_ends_before_it_attests(tmp_path: Path, start: Start) -> None:
    supervisor = start(hooks=(hook("slow", 0.3),))
    rank = Rank.of(big_state())
    arena = rank.arena()
    submission, _ = submit(supervisor, rank, arena, tmp_path / "c")
    with pytest.raises(Refused, match="still being written"):
        submit(supervisor, rank, arena, tmp_path / "e")
    behind, _ = submit(supervisor, rank, rank.arena(), tmp_path / "d")
    supervisor.cancel(submission)
    supervisor.cancel(behind)
    for one in (submission, behind):
        with pytest.raises(CheckpointError, match="cancelled"):
            one.result(BOUND_S)
    assert list(tmp_path.rglob("00000.msgpack")) == []


def test_waiting_has_a_limit_and_the_save_goes_on(tmp_path: Path, start: Start, blocking: Path) -> None:
    supervisor = start(hooks=(hook("slow", 0.05),))
    rank = Rank.of(big_state())
    submission, finish = submit(supervisor, rank, rank.arena(), tmp_path / "c")
    with pytest.raises(DeadlineExceeded):
        submission.result(0.01)
    finish()
    demand_equal(tmp_path / "c", blocking)


def test_a_closed_writer_takes_nothing_and_leaves_no_process(tmp_path: Path, start: Start) -> None:
    supervisor = start()
    rank = Rank.of(big_state())
    arena = rank.arena()
    save_through(supervisor, rank, arena, tmp_path / "a")
    pid = supervisor.pid
    assert pid is not None
    supervisor.close()
    supervisor.close()
    assert gone(pid)
    with pytest.raises(Refused, match="closed"):
        submit(supervisor, rank, arena, tmp_path / "b")


def test_closing_with_a_save_under_way_leaves_it_to_the_writer(tmp_path: Path, start: Start) -> None:
    supervisor = start(hooks=(hook("slow", 0.05),))
    rank = Rank.of(big_state())
    arena = rank.arena()
    submission, _ = submit(supervisor, rank, arena, tmp_path / "c")
    until(lambda: supervisor.pid and list(tmp_path.glob(".c.draft*/params")), "a writer at work")
    pid = supervisor.pid
    assert pid is not None
    supervisor.close(limit_s=0.0)
    with pytest.raises(WriterLost, match="left to it to finish"):
        submission.result(BOUND_S)
    assert arena.retired
    until(lambda: ended(pid), "the writer's end")
    assert list(tmp_path.glob(".c.draft*/fragments/00000.msgpack")) != []


def test_what_is_submitted_while_the_writer_is_closed_is_refused_and_not_forgotten(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = start()
    rank = Rank.of(big_state(1))
    arena = rank.arena()
    real = supervisor_module.submission_of

    def closing(*args: object) -> Submission:
        supervisor.close()  # by another thread, when `submit` has found it open
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(supervisor_module, "submission_of", closing)
    with pytest.raises(Refused, match="closed"):
        submit(supervisor, rank, arena, tmp_path / "c")
    arena.require_free()


def test_a_supervisor_that_fails_gives_no_arena_away_that_a_writer_reads(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[SAVE-92]"""
    supervisor = start(hooks=(hook("slow", 0.05),))
    rank = Rank.of(big_state(1))
    arena = rank.arena()

    heard = Supervisor._heard

    def fail(self: Supervisor, message: WriterMessage) -> None:
        if any(one.handed for one in self._pending.values()):  # before that no writer reads it
            raise RuntimeError("a fault of ours")
        heard(self, message)

    monkeypatch.setattr(Supervisor, "_heard", fail)
    submission, _ = submit(supervisor, rank, arena, tmp_path / "c")
    with pytest.raises(WriterLost, match="its supervisor failed: RuntimeError: a fault of ours"):
        submission.result(BOUND_S)
    assert arena.retired
    until(lambda: supervisor.closed, "its end")
    with pytest.raises(Refused, match="closed"):
        submit(supervisor, rank, rank.arena(), tmp_path / "d")


def test_a_forked_child_cannot_use_its_parents_writer(tmp_path: Path, start: Start) -> None:
    supervisor = start()
    rank = Rank.of({"t": {}})
    arena = Arena.create(1)
    store, draft = begun(tmp_path, "c")
    staged = rank.staged(draft, store, 0, b"", "process")
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(Refused):
            supervisor.submit(staged, arena)
            code = 2
        os._exit(code - 1 if code == 2 else 0)
    assert os.waitpid(pid, 0)[1] == 0
    assert supervisor.submit(staged, arena).result(BOUND_S).file is not None


# -- trainers that end -------------------------------------------------------------------------------------------------


def killed_trainer(folder: Path, hook: str = "", *, lease_s: float = 600.0, forks: bool = False) -> int:
    """The process id of the writer of a trainer that was killed when it had submitted a save, if there is a hook."""
    with spawn_ranks(trains, 1, str(folder), hook, lease_s, forks, timeout_s=2 * BOUND_S) as ranks:
        told = Path(f"{folder}.writer")
        until(told.exists, "a writer")
        ranks.kill(0)
    return int(told.read_text())


@pytest.mark.parametrize("how", ["alone", "with a child that holds its sockets"])
def test_what_was_staged_is_finished_after_the_trainers_death_and_then_the_writer_ends(tmp_path: Path, how: str) -> None:
    pid = killed_trainer(tmp_path, hook("slow", 0.05), forks=how != "alone")
    until(lambda: ended(pid), "the writer's end")
    rank = Rank.of(state_of(1))
    (folder,) = tmp_path.glob(".c.draft*")
    data = (folder / fragments_file(0)).read_bytes()
    store, draft = begun(tmp_path, "c")
    store.remove_tree(draft.folder)
    left = replace(draft, folder=folder.name, attempt=decode_fragments(data, path="").attempt)
    commit(rank, store, left, FileDigest(fragments_file(0), len(data), file_digest(data)))
    assert ek.open(tmp_path / "c").verify().sound


def test_an_orphan_ends_with_its_lease_whatever_is_left(tmp_path: Path) -> None:
    pid = killed_trainer(tmp_path, hook("slow", 600), lease_s=0.5)
    until(lambda: ended(pid), "the end of the lease")
    assert list(tmp_path.rglob("00000.msgpack")) == []


def test_an_idle_writer_ends_with_its_trainer(tmp_path: Path) -> None:
    pid = killed_trainer(tmp_path)
    until(lambda: ended(pid), "the writer's end")


# -- memory ------------------------------------------------------------------------------------------------------------


def held_by(pid: int) -> tuple[int, int, int]:
    """(descriptors, mappings of arenas, resident bytes) of a process."""
    process = psutil.Process(pid)
    maps = Path(f"/proc/{pid}/maps").read_text().count("memfd:elastickpt-arena")
    return process.num_fds(), maps, process.memory_info().rss


def test_fifty_saves_keep_no_more_than_three(memory_path: Path, start: Start) -> None:
    gc.collect()
    others = {"trainer": held_by(os.getpid())[1], "writer": 0}  # arenas that tests before have left in this process
    supervisor = start()
    rank = Rank.of(big_state(1))
    arena = rank.arena()
    seen: list[dict[str, tuple[int, int, int]]] = []
    for number in range(50):
        save_through(supervisor, rank, arena, memory_path / str(number))
        if number in (2, 49):
            gc.collect()
            assert supervisor.pid is not None
            seen.append({"trainer": held_by(os.getpid()), "writer": held_by(supervisor.pid)})
    for who in ("trainer", "writer"):
        early, late = seen[0][who], seen[1][who]
        assert (late[0], late[1]) == (early[0], others[who] + 1), who
        assert late[2] - early[2] < 8 << 20, who


def test_an_arena_that_is_given_up_is_freed_in_both_processes(memory_path: Path, start: Start) -> None:
    gc.collect()
    others = held_by(os.getpid())[1]
    supervisor = start()
    rank = Rank.of(big_state(1))
    seen = []
    for number in range(5):
        arena = rank.arena()
        save_through(supervisor, rank, arena, memory_path / str(number))
        supervisor.forget(arena)
        arena.close()
        gc.collect()
        pid = supervisor.pid
        assert pid is not None
        until(lambda pid=pid: held_by(pid)[1] == 0, "the writer to give the arena up")  # type: ignore[misc]
        assert held_by(os.getpid())[1] == others
        seen.append((held_by(pid)[0], held_by(os.getpid())[0]))
    assert len(set(seen[1:])) == 1
