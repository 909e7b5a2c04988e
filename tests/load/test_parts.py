"""A part of what was saved, loaded by the ranks that saved it, is no other layout: what is a rank's own goes back to it."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import elastickpt as ek
from tools.gloo_ranks import run_ranks

pytestmark = pytest.mark.ranks


class Loader:
    """One that each rank has its own of, and that cannot be resharded."""

    def __init__(self, place: int = -1) -> None:
        self.place = place

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def draw() -> list[float]:
    return [torch.rand(1).item(), random.random(), float(numpy.random.rand())]


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


def sharded(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers)
    return fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("dp",)))


def attempt(state: dict[str, Any], path: str, **options: Any) -> ek.LoadReport | str:
    try:
        return ek.load(state, path, **options)
    except ek.errors.CheckpointError as error:
        return str(error)


def layers() -> tuple[nn.Module, ...]:
    return nn.Linear(4, 4), nn.Linear(4, 2)


def saves(rank: int, world_size: int, path: str) -> list[float]:
    seed(rank)
    draw()
    ek.save({"model": sharded(*layers()), "loader": ek.PerRank(Loader(rank)), "rng": ek.RNG()}, path, step=3)
    return draw()


def go_parts(rank: int, world_size: int, path: str) -> dict[str, Any]:
    """What each part of the state gives: the place of the loader, and whether the streams go on."""
    expected = saves(rank, world_size, path)
    seen: dict[str, Any] = {}

    def part(name: str, state: dict[str, Any], strict: str) -> None:
        loader = Loader()
        seed(99)
        found = attempt({"loader": ek.PerRank(loader), "rng": ek.RNG(), **state}, path, strict=strict)
        notes = found if isinstance(found, str) else found.notes
        seen[name] = (notes, loader.place == rank, draw() == expected)

    part("all", {"model": sharded(*layers())}, "all")
    part("nothing else", {}, "missing")
    part("a model more", {"model": sharded(*layers()), "other": sharded(nn.Linear(3, 3))}, "unexpected")
    part("another model", {"other": sharded(nn.Linear(3, 3))}, "none")
    part("a layer less", {"model": sharded(nn.Linear(4, 4))}, "missing")
    part("a layer more", {"model": sharded(*layers(), nn.Linear(2, 2))}, "unexpected")
    part("plain", {"model": nn.Sequential(*layers())}, "all")
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("other",))
    part("another mesh", {"other": fully_shard(nn.Linear(3, 3), mesh=mesh)}, "none")
    return seen | {"stages": go_stages(rank, f"{path}-stages")}


def go_stages(rank: int, path: str) -> tuple[bool, str]:
    """Two ranks, a stage each, which then change places."""

    def state(at: int, loader: Loader) -> dict[str, Any]:
        return {"model": nn.ModuleDict({f"layer{at}": nn.Linear(2, 2)}), "loader": ek.PerRank(loader)}

    ek.save(state(rank, Loader(rank)), path)
    own, other = Loader(), Loader()
    ek.load(state(rank, own), path)
    return own.place == rank, str(attempt(state(1 - rank, other), path))


def test_a_part_loaded_at_the_layout_that_saved_it(tmp_path: Path) -> None:
    for seen in run_ranks(go_parts, 2, str(tmp_path / "c"), timeout_s=120.0):
        for name in ("all", "nothing else", "a model more", "another model", "a layer less", "a layer more"):
            assert seen[name] == ((), True, True), name
        for name in ("plain", "another mesh"):
            notes, own, _ = seen[name]
            assert "expected the layout that saved it (2 ranks)" in notes
            assert not own
        in_place, swapped = seen["stages"]
        assert in_place
        assert "expected the layout that saved it" in swapped


def go_again(rank: int, world_size: int, root: str) -> dict[str, Any]:
    path = f"{root}/again"
    expected = saves(rank, world_size, path)
    report = ek.load({"rng": ek.RNG()}, path, strict="missing")
    iter(torch.utils.data.DataLoader([1, 2]))  # draws a seed
    first = draw()
    report.restore_streams()
    second = draw()
    report.restore_streams()
    refused = ""
    try:
        ek.load({"loader": ek.PerRank(Loader())}, path, strict="missing").restore_streams()
    except ek.errors.Refused as error:
        refused = str(error)
    run = ek.Run(f"{root}/run", {"rng": ek.RNG()}, options=ek.RunOptions(signals={}))
    before = draw()
    run.restore().restore_streams()  # from nothing: nothing to set
    run.save(1).result(60.0)
    going_on = draw()
    found = run.restore()
    draw()
    found.restore_streams()
    again = draw()
    run.close()
    return {
        "first": first != expected,
        "second": second == expected,
        "refused": refused,
        "run": going_on == again != before,
    }


def test_streams_are_set_once_more_after_a_loader_drew_of_them(tmp_path: Path) -> None:
    for seen in run_ranks(go_again, 2, str(tmp_path), timeout_s=120.0):
        assert seen == {"first": True, "second": True, "refused": seen["refused"], "run": True}
        assert "put an ek.RNG() into `state`" in seen["refused"]


def loads_of_one(rank: int, world_size: int, path: str) -> dict[str, Any]:
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                said.append(record.getMessage())

    logging.getLogger("elastickpt").addHandler(Kept())
    found = []
    for _ in range(2):
        seed(50)
        report = ek.load({"rng": ek.RNG()}, path)
        found.append(draw())
    report.restore_streams()
    return {"drawn": found[0], "alike": found[0] == found[1] == draw(), "notes": report.notes, "said": said}


def test_streams_of_one_process_go_on_on_one_of_several(tmp_path: Path) -> None:
    """And the report says so, and rank 0 logs what it says, once."""
    path = str(tmp_path / "one")
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        seed(7)
        ek.save({"rng": ek.RNG()}, path, step=4)
        expected = draw()
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        numpy.random.set_state(before[2])
    ranks = run_ranks(loads_of_one, 3, path, timeout_s=60.0)
    assert ranks[0]["drawn"] == expected
    for stream in zip(*(seen["drawn"] for seen in ranks), strict=True):
        assert len(set(stream)) == 3
    for rank, seen in enumerate(ranks):
        assert seen["alike"]
        assert len(seen["notes"]) == 3
        assert all(
            "rank 0 goes on with it, on the others it was seeded anew from (seed, step, rank)" in n for n in seen["notes"]
        )
        assert seen["said"] == ([f"{path}: {note}" for _ in range(2) for note in seen["notes"]] if rank == 0 else [])
