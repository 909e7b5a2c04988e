"""Ranks that come late, make a call alone, or die: who is waited for, for how long, and what the others are told."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import elastickpt as ek
from elastickpt.errors import CheckpointError
from elastickpt.ranks import process_group, star
from tools.gloo_ranks import run_ranks, spawn_ranks

Told = tuple[str, str, tuple[int, ...]]  # kind, message, ranks in the report
SILENCE_S, LATE_S = 1.5, 2.0  # more than the silence that a rank may keep within a call
INSIDE = ("hub", "host/", "far", "here/", " key", "member")  # words of the library's own talk, which no user should read


def told(call: Callable[[], object]) -> Told:
    """How a call ended here."""
    try:
        call()
    except CheckpointError as error:
        return error.kind, error.message, tuple(failure.rank for failure in error.report)
    return "", "", ()


def quickly_silent() -> None:
    """Ranks that are silent within a call are given up sooner than in life, and beat more often."""
    assert process_group.team_of.__kwdefaults__ is not None
    process_group.team_of.__kwdefaults__["silence_s"] = SILENCE_S
    star.BEAT_S = 0.05  # type: ignore[attr-defined]


def state() -> dict[str, object]:
    return {"t": torch.ones(3)}


# -- a rank that is gone -------------------------------------------------------------------------------------------------


def saves_after_a_death(rank: int, world_size: int, root: str, victim: int, met_in: str) -> list[Told]:
    """One save together, then the victim kills itself; the others save on, in both ways."""
    if met_in == "save":
        ek.save(state(), f"{root}/together")
    else:
        ek.async_save(state(), f"{root}/together").result()
    dist.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    found = []
    for n in range(2):
        found.append(told(lambda n=n: ek.save(state(), f"{root}/blocking{n}")))
        found.append(told(lambda n=n: ek.async_save(state(), f"{root}/beside{n}").result()))
        found.append(told(lambda: ek.load(state(), f"{root}/together")))
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("met_in", ["save", "async_save"])
@pytest.mark.parametrize("victim", [0, 2])
def test_every_call_after_a_rank_died_fails_at_once_and_says_who_is_lost(victim: int, met_in: str, tmp_path: Path) -> None:
    """Six calls each, which had to wait for the 30 minutes of gloo otherwise. [SAVE-113]"""
    with spawn_ranks(saves_after_a_death, 3, str(tmp_path), victim, met_in, timeout_s=120.0) as job:
        outcomes = job.wait()
        pid = job.pids[victim]
    for outcome in outcomes:
        if outcome.rank == victim:
            continue
        assert outcome.error is None, outcome
        for kind, message, ranks in outcome.value:
            assert kind == "rank-lost", message
            assert victim in ranks
            if victim == 0 and not message.startswith(f"rank {victim}: this rank"):
                assert "job's store" in message or f"process {pid} is gone" in message
            else:
                assert f"process {pid} is gone, as was noticed at 20" in message
            assert not [word for word in INSIDE if word in message], message
    assert sorted(path.name for path in tmp_path.iterdir() if ".draft-" not in path.name) == ["together"]


# -- a limit that is none ----------------------------------------------------------------------------------------------


def limits_that_are_none(rank: int, world_size: int, root: str, wrong: int) -> list[Told]:
    """One rank gives a limit that is none, in the first call of the group and in later ones; then all do as they should."""
    limit = -1.0 if rank == wrong else None
    first = told(lambda: ek.save(state(), f"{root}/a", wait_limit_s=limit))
    ek.save(state(), f"{root}/a")
    return [
        first,
        told(lambda: ek.save(state(), f"{root}/b", wait_limit_s=limit)),
        told(lambda: ek.load(state(), f"{root}/a", wait_limit_s=limit)),
        told(lambda: ek.load(state(), f"{root}/a")),
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_limit_that_is_none_on_one_rank_is_refused_on_all(wrong: int, tmp_path: Path) -> None:
    for outcome in run_ranks(limits_that_are_none, 2, str(tmp_path), wrong):
        *refused, (kind, _, _) = outcome
        assert kind == ""
        for kind, message, ranks in refused:
            assert (kind, ranks) == ("refused", (wrong,))
            assert "wait_limit_s=-1.0: expected seconds" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


# -- a call that one rank makes alone --------------------------------------------------------------------------------------


def saves_alone(rank: int, world_size: int, root: str, lone: int, met: bool) -> tuple[list[Told], Told]:
    """`if rank == lone: ek.save(...)`, then all save to the same path."""
    if met:
        ek.save(state(), f"{root}/before")
    alone = []
    if rank == lone:
        alone.append(told(lambda: ek.save(state(), f"{root}/p", wait_limit_s=0.3)))
        alone.append(told(lambda: ek.save(state(), f"{root}/p", wait_limit_s=0.3)))
        if met:
            alone.append(told(lambda: ek.load(state(), f"{root}/before", wait_limit_s=0.3)))
    dist.barrier()
    return alone, told(lambda: ek.save(state(), f"{root}/p"))


@pytest.mark.ranks
@pytest.mark.parametrize("met", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize("lone", [0, 1])
def test_a_save_by_one_rank_alone_names_the_others_and_uses_up_none_of_their_saves(
    lone: int, met: bool, tmp_path: Path
) -> None:
    """[SAVE-111, SAVE-112]"""
    for rank, (alone, together) in enumerate(run_ranks(saves_alone, 3, str(tmp_path), lone, met)):
        assert together == ("", "", ())
        for kind, message, ranks in alone:
            assert kind == "deadline-exceeded"
            assert "0.3 s (wait_limit_s)" in message
            assert f"save to {tmp_path}/p" in message or f"load of {tmp_path}/before" in message
            assert "every rank of ranks 0, 1, 2 must call it" in message
            assert set(ranks) == ({0, 1, 2} - {rank} if lone == 0 or not met else {0})
            text = message.replace(str(tmp_path), "")
            assert not [word for word in INSIDE if word in text], message
    assert ek.open(tmp_path / "p").verify().sound


# -- a rank that comes late ------------------------------------------------------------------------------------------------


def calls_with_one_late(rank: int, world_size: int, root: str, late: int, calls: tuple[str, ...]) -> list[object]:
    quickly_silent()

    def comes(name: str, call: Callable[[], object]) -> Told:
        if rank == late and name in calls:
            time.sleep(LATE_S)
        return told(call)

    live = state()
    run = ek.Run(f"{root}/run", live)
    found = [
        comes("save", lambda: ek.save(state(), f"{root}/c")),
        comes("load", lambda: ek.load(live, f"{root}/c")),
        comes("restore", lambda: run.restore()),
    ]
    found.append(told(lambda: run.save(1).result()))
    found.append(comes("rollback", lambda: run.restore()))
    run.close()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("late", "calls"),
    [
        (0, ("save", "rollback")),
        (1, ("load", "restore")),
        pytest.param(0, ("save", "load", "restore", "rollback"), marks=pytest.mark.long),
        pytest.param(1, ("save", "load", "restore", "rollback"), marks=pytest.mark.long),
    ],
)
def test_a_late_rank_breaks_no_save_load_restore_or_rollback(late: int, calls: tuple[str, ...], memory_path: Path) -> None:
    """[SAVE-110]"""
    assert run_ranks(calls_with_one_late, 2, str(memory_path), late, calls) == [[("", "", ())] * 5] * 2


def later_than_the_limit(rank: int, world_size: int, root: str, late: int) -> list[Told]:
    """Both fail, and no process is gone."""
    ek.save(state(), f"{root}/before")
    live = state()
    dist.barrier()
    run = ek.Run(f"{root}/run", live, options=ek.RunOptions(wait_limit_s=0.5))
    dist.barrier()
    found = []
    for call in (
        lambda: ek.save(state(), f"{root}/c", wait_limit_s=0.3),
        lambda: ek.load(state(), f"{root}/before", wait_limit_s=0.3),
        lambda: run.restore(),
    ):
        if rank == late:
            dist.barrier()
        found.append(told(call))
        if rank != late:
            dist.barrier()
        dist.barrier()
    run.close()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("late", [0, 1])
def test_who_came_too_late_is_not_told_that_a_process_is_gone(late: int, tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(later_than_the_limit, 2, str(tmp_path), late)):
        for kind, message, ranks in found:
            assert (kind, ranks) == ("deadline-exceeded", (1 - rank,))
            assert "did not come" in message
            assert "gone" not in message


def late_behind_a_death(rank: int, world_size: int, root: str, late: int) -> Told:
    ek.save(state(), f"{root}/before")
    dist.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == late:
        time.sleep(1.0)
    return told(lambda: ek.save(state(), f"{root}/c"))


@pytest.mark.ranks
@pytest.mark.parametrize("late", [0, 1])
def test_a_late_rank_is_told_who_died_and_not_who_gave_up(late: int, tmp_path: Path) -> None:
    with spawn_ranks(late_behind_a_death, 3, str(tmp_path), late, timeout_s=120.0) as job:
        outcomes = job.wait()
    for outcome in outcomes[:2]:
        kind, message, ranks = outcome.value
        assert (kind, ranks) == ("rank-lost", (2,))
        assert f"process {job.pids[2]} is gone" in message


# -- groups that are formed anew -------------------------------------------------------------------------------------------


def formed_anew(rank: int, world_size: int, root: str) -> list[tuple[int, int, str]]:
    """Threads of this library, sockets, and the name of a run's teams, in each of four groups after another."""
    seen = []
    port = int(os.environ["MASTER_PORT"]) if "MASTER_PORT" in os.environ else 0
    for life in range(4):
        group = dist.new_group([0, 1])
        ek.save(state(), f"{root}/c{life}", process_group=group)
        ek.async_save(state(), f"{root}/a{life}", process_group=group).result()
        run = ek.Run(f"{root}/run", state(), process_group=group)
        run.restore()
        name = run._purpose
        run.close()
        dist.destroy_process_group(group)
        del group, run
        gc.collect()
        seen.append((*_settled(seen[0][:2] if seen else None), name))
    assert port >= 0
    return seen


def _settled(before: tuple[int, int] | None) -> tuple[int, int]:
    """Threads and sockets, once there are no more than before: what is closed is closed in a moment, by other threads."""
    until = time.monotonic() + (20.0 if before else 0.5)
    while True:
        threads = sum(one.name.startswith("elastickpt-beat") for one in threading.enumerate())
        sockets = sum("socket" in _link(fd) for fd in os.listdir("/proc/self/fd"))
        if time.monotonic() > until or (before and threads <= before[0] and sockets <= before[1]):
            return threads, sockets
        time.sleep(0.02)


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


@pytest.mark.ranks
def test_a_group_that_is_gone_takes_threads_and_sockets_along_and_the_next_one_counts_anew(tmp_path: Path) -> None:
    """[SAVE-114]"""
    for seen in run_ranks(formed_anew, 2, str(tmp_path)):
        assert len({name for _, _, name in seen}) == 1
        assert [threads for threads, _, _ in seen if threads > seen[0][0]] == []
        assert [sockets for _, sockets, _ in seen if sockets > seen[0][1]] == []
