"""Saves beside training by real ranks: the blocking save's checkpoint, and every failure told alike to all.

All of it runs in one launch of three ranks; the tests look at what each of them saw.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from memory_folder import memory_folder
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import elastickpt as ek
from elastickpt import errors
from elastickpt.errors import NoSpace
from elastickpt.ranks import star
from elastickpt.ranks.process_group import job_group
from elastickpt.saving import beside
from elastickpt.saving import saver as saver_module
from elastickpt.saving.async_save import saver_of
from tools.gloo_ranks import run_ranks

WORLD = 3
LIMIT_S = 60.0
Seen = dict[str, Any]
PLAIN = ek.AsyncOptions()


def outcome(handle: ek.SaveHandle) -> Seen:
    error = handle.exception(LIMIT_S)
    if error is None:
        return {"error": "", "report": [], "message": "", "path": handle.result().path}
    report = [(f.rank, f.kind) for f in getattr(error, "report", ())]
    return {"error": type(error).__name__, "report": report, "message": str(error), "path": ""}


def files(folder: str) -> dict[str, bytes]:
    """Every file, but for those that name the attempt and the time."""
    root = Path(folder)
    every = sorted(path for path in root.rglob("*") if path.is_file())
    names = {path.relative_to(root).as_posix(): path for path in every}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(("fragments/", "checkpoint.json"))}


class Job:
    """One rank with a state of all kinds: sharded and replicated parameters, momentum, values of its own."""

    def __init__(self, rank: int, root: str) -> None:
        self.rank, self.root = rank, root
        self.seen: dict[str, Seen] = {}
        self.rounds: list[str] = []
        torch.manual_seed(0)
        self.mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("dp",))
        self.model = nn.Linear(300, 301)
        self.model.weight = nn.Parameter(self.sharded(torch.randn(301, 300)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.step()

    def sharded(self, whole: torch.Tensor) -> DTensor:
        local = torch.chunk(whole, WORLD)[self.rank].clone()
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def state(self, **more: Any) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "own": ek.PerRank({"rank": self.rank}), "note": [1], **more}

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def asked(self, state: dict[str, Any], name: str, **options: Any) -> ek.SaveHandle:
        return ek.async_save(state, self.path(name), mesh=self.mesh, **options)

    def saved(self, name: str, state: dict[str, Any], **options: Any) -> None:
        """Tries, looks at what is left, and saves the job's own state."""
        self.seen[name] = outcome(self.asked(state, f"{name}/c", **options))
        dist.barrier()
        left = sorted(os.listdir(self.path(name)))
        again = outcome(self.asked(self.state(), f"{name}/next", **options))
        self.seen[name] |= {"left": left, "next": again["error"] or ek.open(again["path"]).verify().sound}
        dist.barrier()


def go_through(rank: int, world_size: int, root: str, meanwhile_nbytes: int) -> dict[str, Seen]:
    saver_module.MEANWHILE_NBYTES = meanwhile_nbytes
    job = Job(rank, root)
    for name in ("value", "skip", "token", "grown", "alternating"):
        os.makedirs(job.path(name), exist_ok=True)
    dist.barrier()
    real = star.Star.round

    def counted(self: star.Star, name: str, contribute: Any, decide: Any) -> bytes:
        job.rounds.append(name)
        return real(self, name, contribute, decide)

    star.Star.round = counted  # type: ignore[method-assign]
    for scenario in (_same_as_blocking, _failures, _skip, _structures, _two_at_once, _rounds, _stages, _groups):
        scenario(job)
    return job.seen


def _same_as_blocking(job: Job) -> None:
    ek.save(job.state(), job.path("blocking"), mesh=job.mesh, step=1)
    first = job.asked(job.state(), "first", step=1)
    job.step()  # what is done right after the call is not in the checkpoint
    first.result(LIMIT_S)
    ek.save(job.state(), job.path("blocking-2"), mesh=job.mesh, step=2)
    before = len(job.rounds)
    writer = saver_of(job_group(None), PLAIN)._yard._supervisor.pid  # type: ignore[union-attr]
    assert writer is not None
    os.kill(writer, signal.SIGSTOP)  # so that the second save is under way when the next one is asked for
    second = job.asked(job.state(), "second", step=2)
    job.step()
    handed: list[tuple[str, bool]] = []
    called = threading.Event()
    second.add_done_callback(lambda handle: (handed.append((handle.path, handle.done())), called.set()))
    between = outcome(job.asked(job.state(), "second", step=2))  # to the same path
    os.kill(writer, signal.SIGCONT)
    info = second.result(LIMIT_S)
    called.wait(LIMIT_S)
    rounds = job.rounds[before:]
    dist.barrier()
    equal = [files(job.path(a)) == files(job.path(b)) for a, b in (("blocking", "first"), ("blocking-2", "second"))]
    live = Job(job.rank, job.root)
    ek.load(live.state(), info.path, mesh=live.mesh)
    ek.save(live.state(), job.path("loaded"), mesh=live.mesh, step=2)
    dist.barrier()
    job.seen["same"] = {
        "equal": equal,
        "sound": ek.open(info.path).verify().sound,
        "resaved": files(info.path) == files(job.path("loaded")),
        "step": info.step,
        "nbytes": info.nbytes,
        "parts": min(info.plan_s, info.write_s, info.commit_s, info.stall_s) >= 0,
        "called": handed == [(info.path, True)],
        "between": between,
        "rounds": rounds,
    }


def _failures(job: Job) -> None:
    job.saved("value", job.state(bad=[lambda: 0] if job.rank == 1 else [0]))
    real = beside.require_token
    if job.rank == 1:
        beside.require_token = _raising(NoSpace("write /x: No space left on device"))
    handle = job.asked(job.state(), "token/c")
    job.seen["token"] = outcome(handle)
    beside.require_token = real
    dist.barrier()
    again = outcome(job.asked(job.state(), "token/c"))
    job.seen["token"] |= {"next": again["error"] or ek.open(again["path"]).verify().sound}
    dist.barrier()
    job.seen["token"] |= {"left": sorted(os.listdir(job.path("token")))}


def _raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*args: object, **options: object) -> Any:
        raise error

    return raise_it


def _skip(job: Job) -> None:
    options = ek.AsyncOptions(stall_limit_s=2.0)
    saver = saver_of(job_group(None), options)
    outcome(job.asked(job.state(), "skip/warm", options=options))
    slot = saver._arenas.reserve(limit_s=1.0) if job.rank == 2 else None
    job.seen["skip"] = outcome(job.asked(job.state(), "skip/c", options=options))
    if slot is not None:
        slot.release()
    dist.barrier()
    left = sorted(os.listdir(job.path("skip")))
    again = outcome(job.asked(job.state(), "skip/c", options=options))
    job.seen["skip"] |= {"left": left, "next": again["error"] or ek.open(again["path"]).verify().sound, "count": saver.skipped}
    dist.barrier()


def _structures(job: Job) -> None:
    more = {"extra": torch.full((7,), 3.0)}
    everywhere = outcome(job.asked(job.state(**more), "grown/everywhere"))
    one = job.state(**more, odd=torch.ones(5)) if job.rank == 1 else job.state(**more)
    outcome(ek.async_save(job.state(**more), job.path("grown/before")))  # nothing declares replicas from here on
    on_one = outcome(ek.async_save(one, job.path("grown/one")))
    once_more = outcome(ek.async_save(one, job.path("grown/one")))
    job.seen["grown"] = {
        "everywhere": everywhere["error"] or len(ek.open(everywhere["path"]).records),
        "one": on_one,
        "next": once_more["error"] or len(ek.open(once_more["path"]).records),
    }
    dist.barrier()
    before = len(job.rounds)
    small = {"note": 1, "t": torch.ones(4)}
    for number in range(2):  # two structures in turn: both are known after the first time
        outcome(job.asked(small, f"alternating/s{number}"))
        outcome(job.asked(job.state(), f"alternating/l{number}"))
        if number == 0:
            before = len(job.rounds)
    job.seen["alternating"] = {"rounds": job.rounds[before:]}
    stage = {f"stage_{job.rank}": {"w": torch.full((3,), float(job.rank)), "n": job.rank}}
    pieces = [outcome(ek.async_save(stage, job.path(f"alternating/p{number}"))) for number in range(2)]
    real = beside.require_token
    if job.rank == 2:
        beside.require_token = _raising(NoSpace("write /x: No space left on device"))
    failed = outcome(ek.async_save(stage, job.path("alternating/failed")))
    beside.require_token = real
    dist.barrier()
    job.seen["alternating"] |= {"failed": (failed["error"], os.path.exists(job.path("alternating/failed")))}
    opened = ek.open(pieces[1]["path"])
    job.seen["alternating"] |= {"stages": sorted(opened.values), "sound": opened.verify().sound}


def _two_at_once(job: Job) -> None:
    options = ek.AsyncOptions(arenas=2)
    ended: list[str] = []
    handles = []
    for number in range(4):
        handle = job.asked(job.state(), f"two-{number}", options=options)
        handle.add_done_callback(lambda h: ended.append(os.path.basename(h.path)))
        handles.append(handle)
        job.step()
    sound = [ek.open(handle.result(LIMIT_S).path).verify().sound for handle in handles]
    values = [ek.open(handle.path).arrays["params/model/bias/value"][0] for handle in handles]
    job.seen["two"] = {"sound": sound, "order": ended, "distinct": len(set(map(float, values)))}
    dist.barrier()


def _rounds(job: Job) -> None:
    big = job.sharded(torch.arange(3 << 20, dtype=torch.float32).reshape(-1, 64))
    options = ek.AsyncOptions(arena_nbytes=(2 << 20) + 4096)
    done = outcome(ek.async_save({"big": big}, job.path("rounds"), options=options))
    sound = done["error"] or ek.open(done["path"]).verify().sound
    live = {"big": job.sharded(torch.zeros(3 << 20).reshape(-1, 64))}
    ek.load(live, job.path("rounds"))
    dist.barrier()
    job.seen["rounds"] = {"sound": sound, "equal": torch.equal(live["big"].to_local(), big.to_local())}
    slots = saver_of(job_group(None), options)._arenas._slots
    job.seen["rounds"]["arena"] = slots[0].arena.nbytes


def _stages(job: Job) -> None:
    """A save while the blocking one of the same group goes on in the main thread."""
    handles = [job.asked(job.state(), f"mixed-{number}") for number in range(1)]
    info = ek.save(job.state(), job.path("mixed-blocking"), mesh=job.mesh)
    handles[0].result(LIMIT_S)
    dist.barrier()
    job.seen["mixed"] = {"equal": files(info.path) == files(handles[0].path)}


def _groups(job: Job) -> None:
    pair = dist.new_group([1, 2])
    if job.rank:
        mine = outcome(ek.async_save({"t": torch.ones(3)}, job.path("pair"), process_group=pair))
        before = _savers()
    dist.destroy_process_group(pair)
    del pair
    if job.rank:
        gc.collect()
        until = time.monotonic() + LIMIT_S
        while _savers() == before and time.monotonic() < until:
            time.sleep(0.02)
        job.seen["pair"] = {"error": mine["error"], "ended": before - _savers()}
    dist.barrier()


def _savers() -> int:
    return sum(thread.name == "elastickpt-rounds" for thread in threading.enumerate())


@pytest.fixture(scope="module", params=[saver_module.MEANWHILE_NBYTES, 0], ids=["staged", "being staged"])
def ranks(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[dict[str, Seen]]:
    """Written once it is staged, and written while it is."""
    with memory_folder(tmp_path_factory.mktemp("async")) as folder:
        return run_ranks(go_through, WORLD, str(folder), request.param, timeout_s=120.0)


def of(ranks: list[dict[str, Seen]], name: str) -> Seen:
    """What all ranks saw alike."""
    first = ranks[0][name]
    assert all(seen[name] == first for seen in ranks[1:])
    return first


def test_the_checkpoint_is_that_of_a_blocking_save_at_the_moment_of_the_call(ranks: list[dict[str, Seen]]) -> None:
    seen = of(ranks, "same")
    assert (seen["equal"], seen["sound"], seen["resaved"]) == ([True, True], True, True)
    assert (seen["step"], seen["nbytes"]) == (2, 2 * 4 * (301 * 300 + 301))
    assert seen["parts"]
    assert seen["called"]


def test_a_known_structure_needs_one_round(ranks: list[dict[str, Seen]]) -> None:
    """[SAVE-91]"""
    assert of(ranks, "same")["rounds"] == ["prepare", "prepare"]  # the second one is of the save that is refused


def test_a_second_save_to_a_path_is_refused_by_the_path_while_the_first_is_under_way(ranks: list[dict[str, Seen]]) -> None:
    seen = of(ranks, "same")["between"]
    assert (seen["error"], [rank for rank, _ in seen["report"]]) == ("Refused", [0, 1, 2])
    assert "second: a save to it is still under way" in seen["message"]


def test_what_one_rank_cannot_save_is_reported_on_all(ranks: list[dict[str, Seen]]) -> None:
    seen = of(ranks, "value")
    assert (seen["error"], seen["report"]) == ("ValueNotCarried", [(1, "value-not-carried")])
    assert (seen["left"], seen["next"]) == ([], True)


def test_a_rank_that_fails_after_the_draft_ends_the_attempt_on_all(ranks: list[dict[str, Seen]]) -> None:
    """[SAVE-54, SAVE-57, SAVE-94]"""
    seen = of(ranks, "token")
    assert (seen["error"], seen["report"]) == ("NoSpace", [(1, "no-space")])
    assert (seen["left"], seen["next"]) == (["c"], True)


def test_a_rank_without_an_arena_skips_the_save_on_all(ranks: list[dict[str, Seen]]) -> None:
    """[SAVE-93]"""
    seen = of(ranks, "skip")
    assert (seen["error"], seen["report"]) == ("SaveSkipped", [(2, "save-skipped")])
    assert (seen["left"], seen["next"], seen["count"]) == (["warm"], True, 1)


def test_a_structure_that_changed_on_all_ranks_is_saved_at_once(ranks: list[dict[str, Seen]]) -> None:
    assert of(ranks, "grown")["everywhere"] == 5


def test_a_structure_that_changed_on_one_rank_fails_once(ranks: list[dict[str, Seen]]) -> None:
    """[SAVE-99]"""
    seen = of(ranks, "grown")
    assert seen["one"]["error"] == "StructureConflict"
    assert "that of ranks [1] changed, after ranks [0, 2] had staged" in seen["one"]["message"]
    assert seen["next"] == 6


def test_structures_that_are_known_alternate_without_asking(ranks: list[dict[str, Seen]]) -> None:
    seen = of(ranks, "alternating")
    assert seen["rounds"] == ["prepare", "prepare"]
    assert seen["failed"] == ("NoSpace", False)
    assert (seen["stages"], seen["sound"]) == (["/stage_0", "/stage_1", "/stage_2"], True)


def test_two_saves_are_under_way_and_end_in_order(ranks: list[dict[str, Seen]]) -> None:
    seen = of(ranks, "two")
    assert (seen["sound"], seen["distinct"]) == ([True] * 4, 4)
    assert seen["order"] == [f"two-{number}" for number in range(4)]


def test_an_arena_smaller_than_the_state_goes_round(ranks: list[dict[str, Seen]]) -> None:
    seen = of(ranks, "rounds")
    assert (seen["sound"], seen["equal"]) == (True, True)
    assert seen["arena"] <= (2 << 20) + 4096


def test_a_blocking_save_may_go_on_beside(ranks: list[dict[str, Seen]]) -> None:
    assert of(ranks, "mixed") == {"equal": True}


def test_a_group_of_some_ranks_saves_by_itself_and_takes_its_saver_along(ranks: list[dict[str, Seen]]) -> None:
    assert ranks[1]["pair"] == ranks[2]["pair"] == {"error": "", "ended": 1}


def test_public_errors_of_this_module_are_of_one_tree() -> None:
    assert errors.kinds()["save-skipped"] is errors.SaveSkipped
