"""Facts about the gloo harness: what a rank's result, exception, death and hang look like to the test."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from elastickpt.errors import DeadlineExceeded, RankFailure, RankLost, StructureConflict
from tools.gloo_ranks import run_ranks, spawn_ranks

pytestmark = pytest.mark.ranks


def _sum_of_ranks(rank: int, world_size: int, value: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    total = value * (rank + 1)
    distributed.all_reduce(total)
    return os.getpid(), torch.get_num_threads(), total


def _one_rank_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(0.1)
        raise StructureConflict("two names", report=(RankFailure(1, "structure-conflict", "two names"),))
    distributed.barrier()


def _one_rank_sleeps(rank: int, world_size: int, folder: str) -> None:
    Path(folder, str(rank)).touch()
    if rank == 1:
        time.sleep(600)
    distributed.barrier()


def _told_then_waits(rank: int, world_size: int, folder: str) -> str:
    distributed.barrier()
    Path(folder, str(rank)).touch()
    try:
        distributed.barrier() if rank == 0 else time.sleep(600)
    except RuntimeError:
        return "unblocked"
    return "went through"


def await_all(folder: Path) -> None:
    """Until both ranks have left a file."""
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)


def _unsendable(rank: int, world_size: int) -> object:
    return lambda: None


def test_each_rank_is_a_process_with_one_thread_in_one_group() -> None:
    outcomes = run_ranks(_sum_of_ranks, 4, torch.tensor([1.0, 2.0]))
    pids, threads, totals = zip(*outcomes, strict=True)
    assert len({*pids, os.getpid()}) == 5
    assert threads == (1, 1, 1, 1)
    assert [total.tolist() for total in totals] == [[10.0, 20.0]] * 4


def test_an_exception_of_a_rank_arrives_as_it_is_with_its_traceback() -> None:
    with pytest.raises(StructureConflict, match="two names") as caught:
        run_ranks(_one_rank_raises, 3)
    assert caught.value.report == (RankFailure(1, "structure-conflict", "two names"),)
    assert "_one_rank_raises" in caught.value.__notes__[0]


def test_a_hanging_rank_is_killed_and_its_stack_is_shown(tmp_path: Path) -> None:
    with spawn_ranks(_one_rank_sleeps, 2, str(tmp_path)) as ranks:
        await_all(tmp_path)
        ranks._limit = time.monotonic()
        hanging = ranks.wait()[1]
    assert isinstance(hanging.error, DeadlineExceeded)
    assert "in _one_rank_sleeps" in str(hanging.error)


def test_a_killed_rank_is_reported_and_the_others_live_on(tmp_path: Path) -> None:
    with spawn_ranks(_told_then_waits, 2, str(tmp_path)) as ranks:
        await_all(tmp_path)
        ranks.kill(1)
        survivor, lost = ranks.wait()
    assert (survivor.value, survivor.error, survivor.status) == ("unblocked", None, 0)
    assert isinstance(lost.error, RankLost)
    assert lost.status == -signal.SIGKILL


def test_leaving_the_context_ends_all_ranks(tmp_path: Path) -> None:
    with spawn_ranks(_one_rank_sleeps, 2, str(tmp_path)) as ranks:
        pids = ranks.pids
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_result_that_cannot_cross_processes_is_named() -> None:
    with pytest.raises(RuntimeError, match="the result function cannot be sent"):
        run_ranks(_unsendable, 1)


def test_a_function_inside_another_is_refused() -> None:
    def inner(rank: int, world_size: int) -> None: ...

    with pytest.raises(ValueError, match="no top-level function"):
        run_ranks(inner, 1)


def test_a_module_that_cannot_be_imported_is_named_and_the_next_launch_works(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    code = "def function(rank, world_size): ...\nONLY_HERE\n"
    file.write_text(code)
    scope: dict[str, Any] = {"__name__": "broken", "ONLY_HERE": None}
    exec(compile(code, str(file), "exec"), scope)
    with pytest.raises(ImportError, match="NameError"):
        run_ranks(scope["function"], 2)
    assert len(run_ranks(_sum_of_ranks, 2, torch.ones(1))) == 2
