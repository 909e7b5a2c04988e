"""Real ranks that do not agree, or of which one fails: every rank gets the same error, nothing is left, the next save works.

All of it runs in one launch of three ranks; the tests look at what each of them saw.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import elastickpt as ek
from elastickpt import errors
from elastickpt.loading import session as load_session
from elastickpt.ranks import processes, star
from elastickpt.saving import save as save_session
from tools.gloo_ranks import run_ranks

WORLD = 3
Seen = dict[str, Any]  # "error": class name or "", "message", "report": [(rank, kind)], "left": names beside the path


def _attempt(what: Callable[[], object]) -> Seen:
    try:
        what()
    except errors.CheckpointError as error:
        return {"error": type(error).__name__, "message": str(error), "report": [(f.rank, f.kind) for f in error.report]}
    except Exception as error:
        return {"error": f"raw {type(error).__name__}", "message": str(error), "report": []}
    return {"error": "", "message": "", "report": []}


def _raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*args: object, **options: object) -> Any:
        raise error

    return raise_it


class _Job:
    """One rank going through all scenarios, each in a folder of its own."""

    def __init__(self, rank: int, root: str) -> None:
        self.rank, self.root = rank, root
        self.seen: dict[str, Seen] = {}

    def path(self, name: str, file: str = "c") -> str:
        os.makedirs(f"{self.root}/{name}", exist_ok=True)
        dist.barrier()
        return f"{self.root}/{name}/{file}"

    def save(self, name: str, state: dict[str, Any], *, file: str = "c", **options: Any) -> None:
        """Tries a save, looks at what is left, and saves something plain to the same path."""
        path = self.path(name, file)
        self.seen[name] = _attempt(lambda: ek.save(state, path, **options))
        dist.barrier()
        self.seen[name]["left"] = sorted(os.listdir(f"{self.root}/{name}"))
        dist.barrier()
        again = _attempt(lambda: ek.save({"after": torch.ones(2)}, f"{self.root}/{name}/next"))
        self.seen[name]["next"] = again["error"] or ek.open(f"{self.root}/{name}/next").verify().sound

    def load(self, name: str, state: dict[str, Any], path: str, **options: Any) -> None:
        before = {key: value.clone() for key, value in _tensors(state)}
        self.seen[name] = _attempt(lambda: ek.load(state, path, **options))
        self.seen[name]["unchanged"] = all(torch.equal(before[key], value) for key, value in _tensors(state))
        dist.barrier()


def _tensors(state: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(key, value) for key, value in state.items() if isinstance(value, torch.Tensor)]


def go_through(rank: int, world_size: int, root: str) -> dict[str, Seen]:
    job = _Job(rank, root)
    _disagreements(job)
    _failures(job)
    _plans(job)
    _loads(job)
    _groups(job)
    return job.seen


def _disagreements(job: _Job) -> None:
    rank, same = job.rank, torch.arange(4.0)
    job.save("equal", {"t": same, "v": [1, {"a": None}]})
    job.save("contents", {"t": same, "u": torch.full((3,), float(rank == 2))})
    job.save("values", {"v": {"seed": min(rank, 1)}})
    job.save("shape", {"t": torch.zeros(3 + (rank == 1))})
    job.save("dtype", {"t": torch.zeros(3, dtype=torch.float64 if rank == 2 else torch.float32)})
    job.save("kind", {"x": torch.zeros(1) if rank else nn.Linear(1, 1)})
    job.save("paths", {"t": same}, file=f"c{rank // 2}")
    job.save("steps", {"t": same}, step=rank // 2)
    job.save("durability", {"t": same}, durability="process" if rank == 1 else "power")
    job.save("replicas", {"t": same}, replicas="verify" if rank == 1 else "owner")
    job.save("replicas of another kind", {"t": same}, replicas="all" if rank == 1 else "owner")
    job.save("option", {"t": same}, placement="packed" if rank == 1 else "auto")
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("dp",))
    held = {"t": same} if rank < 2 else {}
    job.save("absent", held, mesh=mesh)
    job.save("absent undeclared", {"s": same, **held})


def _failures(job: _Job) -> None:
    rank = job.rank
    job.save("capture", {"t": torch.ones(2), "v": [lambda: 0] if rank == 1 else [0]})
    job.save("two captures", {"t": torch.ones(2), "v": [lambda: 0] if rank else [0]})
    path = job.path("occupied")
    ek.save({"t": torch.ones(1)}, path)
    job.save("occupied", {"t": torch.ones(2)})
    (Path(job.root) / "file").write_text("x")
    job.save("parent", {"t": torch.ones(2)}, file="../file/c" if rank == 2 else "c")
    for name, failing in (("write", 1), ("write on the committer", 0)):
        real = save_session.write_whole_share
        if rank == failing:
            save_session.write_whole_share = _raising(errors.NoSpace("write /x: No space left on device"))
        path = job.path(name)
        job.seen[name] = _attempt(lambda path=path: ek.save({"t": torch.ones(2)}, path))
        save_session.write_whole_share = real
        dist.barrier()
        job.seen[name]["left"] = sorted(os.listdir(f"{job.root}/{name}"))
        again = _attempt(lambda path=path: ek.save({"t": torch.ones(2)}, path))
        job.seen[name]["next"] = again["error"] or ek.open(path).verify().sound
    real_commit = save_session.commit
    save_session.commit = _raising(errors.CoverageGap("array t: elements [0:1] are stored nowhere"))
    path = job.path("commit")
    job.seen["commit"] = _attempt(lambda: ek.save({"t": torch.ones(2)}, path))
    save_session.commit = real_commit
    dist.barrier()
    job.seen["commit"] |= {"left": sorted(os.listdir(f"{job.root}/commit")), "next": True}


def _plans(job: _Job) -> None:
    """Rounds of three saves, the last one with another structure on one rank."""
    names: list[str] = []
    real = star.Star.round

    def counted(self: star.Star, name: str, contribute: Any, decide: Any) -> bytes:
        names.append(name)
        return real(self, name, contribute, decide)

    star.Star.round = counted  # type: ignore[method-assign]
    for number in range(3):
        state = {"p": torch.full((5,), float(number))} | ({"q": torch.ones(2)} if number == 2 and job.rank == 1 else {})
        ek.save(state, job.path("plans", str(number)))
    star.Star.round = real  # type: ignore[method-assign]
    found = [ek.open(f"{job.root}/plans/{n}").verify().arrays for n in range(3)]
    job.seen["plans"] = {"rounds": names, "arrays": found}


def _loads(job: _Job) -> None:
    rank = job.rank
    path, other = job.path("loads"), f"{job.root}/loads/other"
    ek.save({"t": torch.ones(4), "u": torch.ones(2)}, path, step=1)
    ek.save({"t": torch.zeros(4), "u": torch.zeros(2)}, other, step=2)
    live = {"t": torch.full((4,), 7.0), "u": torch.full((2,), 7.0)}
    job.load("load mismatch on one rank", live | ({"x": torch.ones(1)} if rank == 1 else {}), path)
    job.load("load shape on two ranks", live | ({"u": torch.zeros(3)} if rank else {}), path)
    job.load("load unexpected only where nobody has it", live if rank == 1 else {"t": live["t"]}, path)
    job.load("load other checkpoints", dict(live), path if rank < 2 else other)
    job.load("load other strict modes", dict(live), path, strict="none" if rank == 2 else "all")
    job.load("load absent on one rank", dict(live), path if rank < 2 else f"{path}-absent")
    real = load_session.require_files
    if rank == 2:
        load_session.require_files = _raising(errors.MissingFile("open x: No such file"))
    job.load("load missing file on one rank", {"t": torch.full((4,), 7.0), "u": torch.full((2,), 7.0)}, path)
    load_session.require_files = real


def _groups(job: _Job) -> None:
    rank = job.rank
    pair = dist.new_group([1, 2])
    path = job.path("group")
    state = {"t": torch.full((4,), 3.0), "mine": ek.PerRank({"rank": rank}), "rng": ek.RNG()}
    torch.manual_seed(100 + rank)
    job.seen["group"] = _attempt(lambda: ek.save(state, path, process_group=pair))
    expected = torch.rand(3)
    dist.barrier()
    live = {"t": torch.zeros(4), "mine": ek.PerRank({"rank": -1}), "rng": ek.RNG()}
    torch.manual_seed(0)
    job.seen["group load"] = _attempt(lambda: ek.load(live, path, process_group=pair))
    found = (live["t"].tolist(), live["mine"].value["rank"], torch.equal(torch.rand(3), expected))
    job.seen["group load"]["found"] = found
    dist.barrier()

    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("dp",))
    model = nn.Linear(1024, 1024, bias=False)  # 4 MiB: above the size from which replicas split an array
    nn.init.constant_(model.weight, 2.0)
    info = ek.save({"m": model}, job.path("mesh"), mesh=mesh)
    (record,) = ek.open(info.path).records.values()
    job.seen["mesh"] = {"writers": record.writers, "sound": ek.open(info.path).verify().sound, "nbytes": info.nbytes}

    real = processes.host_identity
    processes.host_identity = lambda: f"host {rank}"
    far = dist.new_group([0, 1, 2])
    path = job.path("hosts")
    job.seen["hosts"] = _attempt(lambda: ek.save({"t": torch.ones(2)}, path, process_group=far, placement="plain"))
    notes: list[str] = []
    path_of_packs = job.path("hosts packed")
    job.seen["hosts packed"] = _attempt(
        lambda: notes.extend(ek.save({"t": torch.ones(2)}, path_of_packs, process_group=far).notes)
    )
    job.seen["hosts packed"]["notes"] = notes
    processes.host_identity = real
    dist.barrier()
    job.seen["hosts"] |= {"left": os.listdir(f"{job.root}/hosts"), "next": True}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Seen]]:
    return run_ranks(go_through, WORLD, str(tmp_path_factory.mktemp("ranks")), timeout_s=120.0)


# scenario: class on every rank, what its message says, ranks whose own failure it is
REFUSED: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "contents": ("ReplicaConflict", ("extra/u", "ranks 0 and 2", "mesh="), (0,)),
    "values": ("ReplicaConflict", ("'/v/seed'", "ranks 0 and 1", "ek.PerRank"), (0,)),
    "shape": ("StructureConflict", ("extra/t", "shape", "(3,) on rank 0", "(4,) on rank 1"), (0,)),
    "dtype": ("StructureConflict", ("extra/t", "float32 on rank 0", "float64 on rank 2"), (0,)),
    "kind": ("StructureConflict", ("'x'", "on rank 0", "on rank 1"), (0,)),
    "paths": ("Refused", ("'c0'", "'c1'", "rank 0", "rank 2"), (0,)),
    "steps": ("Refused", ("step", "0 on rank 0", "1 on rank 2"), (0,)),
    "durability": ("Refused", ("power", "process", "rank 1"), (0,)),
    "replicas": ("Refused", ("'replicas owner') on rank 0", "'replicas verify') on rank 1"), (0,)),
    "replicas of another kind": ("Refused", ("rank 1", "'all'", "owner, sample, verify"), (1,)),
    "option": ("PlacementUnsupported", ("placement", "'auto' on rank 0", "'packed' on rank 1"), (0,)),
    "absent": ("StructureConflict", ("extra/t", "[0, 1]", "[2]"), (0,)),
    "capture": ("ValueNotCarried", ("rank 1", "/v/0"), (1,)),
    "two captures": ("ValueNotCarried", ("rank 1", "rank 2", "/v/0"), (1, 2)),
    "write": ("NoSpace", ("rank 1", "No space left"), (1,)),
    "write on the committer": ("NoSpace", ("rank 0", "No space left"), (0,)),
    "commit": ("CoverageGap", ("array t",), (0,)),
    "hosts": ("PlacementUnsupported", ("3 hosts", "lustre, gpfs", "packed"), (0,)),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_gets_the_same_error_nothing_is_left_and_the_next_save_works(
    ranks: list[dict[str, Seen]], name: str
) -> None:
    cls, texts, at_fault = REFUSED[name]
    first = ranks[0][name]
    assert first["error"] == cls, first
    for text in texts:
        assert text in first["message"]
    assert tuple(rank for rank, _ in first["report"]) == at_fault
    for seen in ranks:
        assert {**seen[name], "next": None} == {**first, "next": None}
        assert seen[name]["next"] is True
    assert first["left"] == []


@pytest.mark.ranks
def test_ranks_that_ask_for_different_placements_are_refused(ranks: list[dict[str, Seen]]) -> None:
    """[SAVE-119]"""
    assert {seen["option"]["error"] for seen in ranks} == {"PlacementUnsupported"}


@pytest.mark.ranks
def test_ranks_on_several_hosts_make_packs_of_their_own_accord(ranks: list[dict[str, Seen]]) -> None:
    for seen in ranks:
        assert seen["hosts packed"]["error"] == ""
    assert any("placement 'packed'" in note and "3 hosts" in note for note in ranks[0]["hosts packed"]["notes"])


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["occupied", "parent"])
def test_a_path_that_cannot_be_taken_is_every_ranks_error(ranks: list[dict[str, Seen]], name: str) -> None:
    for seen in ranks:
        assert seen[name]["error"] in ("PathOccupied", "StorageFailed", "MissingFile")
        assert seen[name]["report"] == ranks[0][name]["report"] != []
        assert seen[name]["left"] == (["c"] if name == "occupied" else [])
        assert seen[name]["next"] is True


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["equal", "absent undeclared"])
def test_what_ranks_may_do(ranks: list[dict[str, Seen]], name: str) -> None:
    """Equal tensors of one name are one array; an array that only some ranks have is saved by these, as in a pipeline."""
    assert [(seen[name]["error"], seen[name]["left"]) for seen in ranks] == [("", ["c"])] * WORLD


@pytest.mark.ranks
def test_structure_is_exchanged_when_it_changed_on_any_rank_only(ranks: list[dict[str, Seen]]) -> None:
    for seen in ranks:
        known = ["prepare", "write"]
        assert seen["plans"]["rounds"][-5:] == ["prepare", "structure", "replicas", "draft", "write"]
        assert seen["plans"]["rounds"][-7:-5] == known
        assert seen["plans"]["arrays"] == [1, 1, 2]


LOADS = {
    "load mismatch on one rank": ("StateMismatch", ("/x: missing", "on rank 1", "nothing was changed")),
    "load shape on two ranks": ("StateMismatch", ("extra/u: shape", "on ranks 1, 2")),
    "load other checkpoints": ("Refused", ("on rank 0", "on rank 2", "attempt", "loads/other")),
    "load other strict modes": ("Refused", ("strict mode", "all", "none", "rank 2")),
    "load absent on one rank": ("NotACheckpoint", ("rank 2", "c-absent")),
    "load missing file on one rank": ("MissingFile", ("rank 2", "No such file")),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", LOADS)
def test_a_load_that_one_rank_cannot_do_changes_nothing_on_any(ranks: list[dict[str, Seen]], name: str) -> None:
    cls, texts = LOADS[name]
    for seen in ranks:
        assert seen[name]["error"] == cls, seen[name]
        assert seen[name]["unchanged"]
        assert seen[name]["message"] == ranks[0][name]["message"]
        for text in texts:
            assert text in seen[name]["message"]


@pytest.mark.ranks
def test_what_any_rank_has_a_place_for_is_not_unexpected(ranks: list[dict[str, Seen]]) -> None:
    assert {seen["load unexpected only where nobody has it"]["error"] for seen in ranks} == {""}


@pytest.mark.ranks
def test_a_subgroup_saves_and_loads_by_itself(ranks: list[dict[str, Seen]]) -> None:
    """Per-rank values and random streams are each member's own, though its number in the job is another."""
    assert [seen["group"]["error"] for seen in ranks] == ["Refused", "", ""]
    assert "rank 0 is not in the process group" in ranks[0]["group"]["message"]
    for rank in (1, 2):
        assert ranks[rank]["group load"]["error"] == "", ranks[rank]["group load"]
        assert ranks[rank]["group load"]["found"] == ([3.0] * 4, rank, True)


@pytest.mark.ranks
def test_declared_replicas_share_the_writing(ranks: list[dict[str, Seen]]) -> None:
    for seen in ranks:
        assert seen["mesh"] == {"writers": (0, 1, 2), "sound": True, "nbytes": 4 << 20}
