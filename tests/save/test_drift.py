"""What a save compares between ranks before anything is committed, and that it finds what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import elastickpt as ek
from elastickpt.format.arrays import ArrayId, ArraySpec, Box, Mesh
from elastickpt.ranks import star
from elastickpt.ranks.process_group import job_group
from elastickpt.saving.async_save import saver_of
from elastickpt.saving.drift import NAMED, ArrayDigest, DriftKind, Hashed, differing_keys, drifted, looks_asked_for, looks_of
from elastickpt.saving.merge import SharedArray
from elastickpt.saving.request import SHARES, Replicas, Request
from elastickpt.saving.staging import DIGEST_NBYTES, range_digest
from elastickpt.saving.structures import KNOWN
from elastickpt.training.held import HeldArray, Kept, Role, Sharing
from elastickpt.writer.plans import MIN_ARENA_NBYTES
from tools.gloo_ranks import run_ranks

WORLD = 4
LIMIT_S = 60.0


# -- digests and shares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 7), (5, 600_000), (333_333, 599_999), (0, 600_000)])
def test_a_range_has_one_digest_whatever_the_strides(first: int, last: int) -> None:
    elements = np.arange(600_000, dtype=np.float32).reshape(750, 800)
    assert elements.nbytes > 2 * DIGEST_NBYTES
    turned = np.ascontiguousarray(elements.T).T
    assert not turned.flags.c_contiguous
    flat = elements.reshape(-1)[first:last]
    assert range_digest(elements, first, last) == range_digest(turned, first, last) == range_digest(flat, 0, last - first)
    if first < last:
        flat[-1] += 1
        assert range_digest(elements, first, last) != range_digest(turned, first, last)


Held = tuple[HeldArray, SharedArray]


def placed(name: str, tensor: torch.Tensor, *, role: Role = "parameter", placement: str = "R") -> Held:
    """One array of rank 0 of two, and what it learned of it."""
    mesh = Mesh("dp", ("dp",), (2,), (0, 1))
    shape = tuple(tensor.shape) if placement == "R" else (2 * tensor.shape[0], *tensor.shape[1:])
    spec = ArraySpec(ArrayId("params", "model", name, "value"), shape, "float32")
    held = HeldArray(spec, Box.whole(tuple(tensor.shape)), tensor, role, "placed", mesh, (placement,))
    return held, SharedArray(f"params/model/{name}/value", (1,), (), True, (), 0, False)


def plain(
    name: str,
    tensor: torch.Tensor,
    sharing: Sharing,
    ranks: tuple[int, ...],
    *,
    peers: tuple[int, ...] = (),
    kept: Kept = "equal",
) -> Held:
    """A whole one; `ranks` are those known to hold it."""
    spec = ArraySpec(ArrayId("params", "model", name, "value"), tuple(tensor.shape), "float32")
    role: Role = "parameter" if kept == "equal" else "buffer"
    replicas = () if sharing == "undeclared" else ranks
    held = HeldArray(spec, Box.whole(tuple(tensor.shape)), tensor, role, sharing, replicas=replicas, kept=kept)
    return held, SharedArray(f"params/model/{name}/value", (1,), ranks, True, peers, 0, False)


def rows_of(arrays: list[Held], request: Request, *, rank: int = 0) -> list[ArrayDigest]:
    held, shared = [one for one, _ in arrays], [fact for _, fact in arrays]
    looks = (*looks_of(held, shared, rank=rank), *looks_asked_for(held, shared, request, rank=rank))
    return Hashed("s", looks, held, share=request.share).rows()


def looked_at(arrays: list[Held], request: Request, *, rank: int = 0) -> dict[str, bytes]:
    return {row.array.name: row.digest for row in rows_of(arrays, request, rank=rank)}


def test_who_declared_what_decides_what_is_looked_at() -> None:
    """[SAVE-67..70] Everything is in a verification, but what others do not hold; what is declared
    costs nothing without one."""
    ones = torch.ones(3)
    arrays = [
        placed("placed", ones),
        placed("placed buffer", ones, role="buffer"),
        placed("sharded", ones, placement="S(0)"),
        placed("empty", torch.ones(0)),
        plain("alone", ones, "declared", (0,)),
        plain("declared", ones, "declared", (0, 1)),
        plain("broadcast", ones, "declared", (0, 1), kept="broadcast"),
        plain("loose", ones, "declared", (0, 1), kept="loose"),
        plain("inferred", ones, "undeclared", (0, 1), peers=(0, 1)),
    ]
    always: dict[str, DriftKind] = {"loose": "loose", "inferred": "inferred"}
    asked: dict[str, DriftKind] = dict.fromkeys(("placed", "placed buffer", "declared"), "declared")
    for replicas, expected in (("owner", always), ("verify", {**always, **asked, "broadcast": "broadcast"})):
        rows = rows_of(arrays, Request("c", 1, replicas=replicas))  # type: ignore[arg-type]
        assert {row.array.name: row.why for row in rows} == expected
        assert len(rows) == len(expected)


def test_of_a_set_that_is_declared_one_rank_speaks_to_other_sets() -> None:
    """Two sets of ranks hold one array, and nobody says that they do: DDP over (0, 2) and (1, 3), say."""
    arrays = [plain("w", torch.ones(3), "declared", (0, 2), peers=(0, 1, 2, 3))]
    assert list(looked_at(arrays, Request("c", 1))) == ["w"]
    assert looked_at(arrays, Request("c", 1), rank=2) == {}
    assert [row.why for row in rows_of(arrays, Request("c", 1, replicas="verify"))] == ["inferred", "declared"]


def test_ranks_meet_by_box_whatever_else_they_hold() -> None:
    """Four ranks, meshes (0, 1) and (2, 3); `b` is on (3, 2): whoever holds one box of an array has one key for it."""
    meshes = {"a": ((0, 1), (2, 3)), "b": ((0, 1), (3, 2)), "c": ((0, 1),)}
    found: dict[tuple[str, int], set[int]] = {}
    summaries = []
    for rank in range(WORLD):
        arrays = []
        for name, sets in meshes.items():
            for ranks in sets:
                if rank in ranks:
                    mesh = Mesh("m", ("dp",), (2,), ranks)
                    box = Box((2 * ranks.index(rank),), (2 * ranks.index(rank) + 2,))
                    spec = ArraySpec(ArrayId("params", "model", name, "value"), (4,), "float32")
                    held = HeldArray(spec, box, torch.full((2,), float(box.start[0])), "parameter", "placed", mesh, ("S(0)",))
                    peers = (0, 1, 2, 3) if len(sets) > 1 else ()
                    arrays.append((held, SharedArray(name, (1,), (), True, peers, 0, False)))
        for row in rows_of(arrays, Request("c", 1), rank=rank):
            found.setdefault((row.array.name, row.box.start[0]), set()).add(row.key)
        held_here, shared = [one for one, _ in arrays], [fact for _, fact in arrays]
        summaries.append(Hashed("s", looks_of(held_here, shared, rank=rank), held_here, share=0).summary())
    assert {place: len(keys) for place, keys in found.items()} == {(n, at): 1 for n in "ab" for at in (0, 2)}
    assert differing_keys(summaries) != ()  # sets with other arrays: asked further, which finds nothing
    assert differing_keys(summaries[:1] * 2) == ()


def test_a_sample_sees_every_byte_within_its_shares() -> None:
    """Of each share what changes in one element of a large array, or in a small one, is seen in one share and no other."""
    names = [f"small.{n}" for n in range(40)]
    large, small = torch.zeros(700_001), {name: torch.zeros(5) for name in names}
    arrays = [placed("large", large), *(placed(name, tensor) for name, tensor in small.items())]
    requests = {request.share: request for request in (Request(f"run/{n}", n, replicas="sample") for n in range(400))}
    assert sorted(requests) == list(range(SHARES))

    def seen() -> list[dict[str, bytes]]:
        return [looked_at(arrays, requests[share]) for share in range(SHARES)]

    before = seen()
    assert sum(name in share for share in before for name in names) == len(names)
    assert all("large" in share for share in before)
    for index in (0, 43_750, 350_000, 700_000):
        large[index] += 1
        after = seen()
        assert [a["large"] != b["large"] for a, b in zip(before, after, strict=True)].count(True) == 1
        before = after
    small["small.7"][4] = 1
    assert [a != b for a, b in zip(before, seen(), strict=True)].count(True) == 1


def test_all_ranks_look_at_the_same_share_however_they_spell_the_path() -> None:
    assert len({Request(path, 7, replicas="sample").share for path in ("c-7", "./c-7", "/runs/c-7/", "file:///runs/c-7")}) == 1


def test_what_differs_is_named_with_the_ranks_that_agree() -> None:
    names = [f"w{n:02}" for n in range(NAMED + 3)]

    def rows(rank: int, why: DriftKind) -> list[ArrayDigest]:
        return [ArrayDigest(1, why, ArrayId("params", "m", n, "value"), Box((0,), (4,)), bytes([rank // 3])) for n in names]

    (said,) = drifted({rank: rows(rank, "declared") for rank in range(5)}).values()
    assert said[7] == "params/m/w07/value [0:4] on ranks [0, 1, 2] and [3, 4]"
    (said,) = drifted({rank: rows(rank, "inferred") for rank in range(5)}).values()
    assert said[0].startswith("array params/m/w00/value: ranks 0 and 3 hold different contents under this name")
    assert drifted({rank: rows(0, "declared") for rank in range(5)}) == {}


# -- real ranks ----------------------------------------------------------------------------------------------------------


class Job:
    """A model that four ranks hold as 2 × 2 shards and replicas, with a norm whose buffers nobody keeps equal."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "fsdp"))
        torch.manual_seed(0)
        self.model = nn.Linear(500, 600)
        self.model.norm = nn.BatchNorm1d(600)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.drifting = (self.model.weight.to_local()[3], self.model.bias.to_local())
        self.before = [row.clone() for row in self.drifting]

    def drift(self, rank: int) -> None:
        """One element of what ranks 0 and 2, or 1 and 3, hold alike, in two arrays, changes on one rank."""
        if self.rank == rank:
            for row in self.drifting:
                row.detach()[7] += 1.0

    def mend(self) -> None:
        for row, before in zip(self.drifting, self.before, strict=True):
            row.detach().copy_(before)

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def save(self, path: str, step: int, replicas: Replicas) -> dict[str, Any]:
        return tried(self.state(), path, step=step, replicas=replicas)


def tried(state: dict[str, Any], path: str, **options: Any) -> dict[str, Any]:
    """A save, blocking or beside training as its path says: its error or notes."""
    try:
        found = ek.async_save(state, path, **options).result(LIMIT_S) if "async" in path else ek.save(state, path, **options)
    except ek.errors.ReplicaConflict as error:
        return {"error": str(error), "notes": ()}
    assert ek.open(path).verify().sound
    return {"error": "", "notes": found.notes}


class Rounds:
    """Names of the rounds of this process, newest last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        real = star.Star.round

        def counted(at: star.Star, name: str, contribute: Any, decide: Any) -> bytes:
            self.names.append(name)
            return real(at, name, contribute, decide)

        monkeypatch.setattr(star.Star, "round", counted)

    def taken(self) -> tuple[str, ...]:
        names = tuple(self.names)
        self.names.clear()
        return names


def go_through(rank: int, world_size: int, root: str) -> dict[str, Any]:
    job, seen, rounds = Job(rank), {}, Rounds(pytest.MonkeyPatch())
    for way in ("blocking", "async"):
        seen[way] = saves = {}
        saves["alike"] = [job.save(f"{root}/{way}-alike-{n}", n, "verify") for n in range(2)]
        rounds.taken()
        saves["again"] = job.save(f"{root}/{way}-again", 2, "verify")
        saves["rounds"] = rounds.taken()
        job.drift(2)
        saves["drifted"] = job.save(f"{root}/{way}-drifted", 4, "verify")
        saves["drifted rounds"] = rounds.taken()
        saves["owner"] = job.save(f"{root}/{way}-owner", 5, "owner")
        saves["sampled"] = [job.save(f"{root}/{way}-sampled-{n}", n, "sample") for n in range(40)]
        job.mend()
        saves["mended"] = job.save(f"{root}/{way}-mended", 6, "verify")
        dist.barrier()
    run = ek.Run(f"{root}/run", job.state(), options=ek.RunOptions(replicas="verify"))
    run.restore()
    saved = run.save(1).exception(LIMIT_S)
    job.drift(1)
    seen["run"] = [str(error) for error in (saved, run.save(2).exception(LIMIT_S))]
    run.close()
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("drift")
    return root, run_ranks(go_through, WORLD, str(root), timeout_s=120.0)


WAYS = pytest.mark.parametrize("way", ["blocking", "async"])
DRIFTED = (
    "params/model/bias/value [0:300] on ranks [0] and [2]",
    "params/model/weight/value [0:300, 0:500] on ranks [0] and [2]",
)


@pytest.mark.ranks
@WAYS
def test_replicas_that_are_alike_cost_no_round(ranks: tuple[Path, list[dict[str, Any]]], way: str) -> None:
    for seen in ranks[1]:
        assert [save["error"] for save in (*seen[way]["alike"], seen[way]["again"])] == ["", "", ""]
        assert seen[way]["rounds"] == (("prepare",) if way == "async" else ("prepare", "write"))


@pytest.mark.ranks
@WAYS
def test_verify_refuses_what_drifted_on_all_ranks_and_names_it(ranks: tuple[Path, list[dict[str, Any]]], way: str) -> None:
    """[SAVE-67]"""
    root, all_seen = ranks
    for seen in all_seen:
        message = seen[way]["drifted"]["error"]
        assert message == all_seen[0][way]["drifted"]["error"]
        assert ", ".join(DRIFTED) in message
        assert "momentum" not in message  # it is alike
        assert "norm" not in message
        assert seen[way]["drifted rounds"] == ("prepare", "drift")
        assert [seen[way][name]["error"] for name in ("owner", "mended")] == ["", ""]
    assert not (root / f"{way}-drifted").exists()


@pytest.mark.ranks
@WAYS
def test_samples_find_it_after_some_saves_and_save_it(ranks: tuple[Path, list[dict[str, Any]]], way: str) -> None:
    """[SAVE-68] The note is rank 0's; the arrays are below a mebibyte, so that each is looked at in one share of sixteen."""
    root, all_seen = ranks
    for rank, seen in enumerate(all_seen):
        notes = [save["notes"] for save in seen[way]["sampled"]]
        shares = [Request(f"{root}/{way}-sampled-{n}", n, replicas="sample").share for n in range(40)]
        telling = {share for share, note in zip(shares, notes, strict=True) if note}
        assert len(telling) == (2 if rank == 0 else 0)
        for note in (one for found in notes for one in found):
            assert any(drifted in note for drifted in DRIFTED)
            assert "saved all the same" in note
        assert [save["error"] for save in seen[way]["sampled"]] == [""] * 40


@pytest.mark.ranks
def test_a_run_verifies_as_its_options_say(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for seen in ranks[1]:
        saved, drifted_one = seen["run"]
        assert saved == "None"
        assert "params/model/weight/value [300:600, 0:500] on ranks [1] and [3]" in drifted_one


# -- what nobody declared, and buffers -----------------------------------------------------------------------------------


class Totals:
    """An object with a state of its own."""

    def __init__(self) -> None:
        self.total = torch.zeros(3)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.total = state["total"]


class Undeclared:
    """What four ranks hold alike at step 0, and nobody says so; experts with a mesh for each half of the ranks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "dp"))
        self.experts = fully_shard(nn.Linear(4, 4), mesh=mesh["dp"])
        self.optimizer = torch.optim.Adam([*self.model.parameters(), *self.experts.parameters()])
        for parameter in (*self.model.parameters(), *self.experts.parameters()):
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.top, self.inside, self.object = torch.zeros(2), torch.zeros(2), Totals()
        self.state = {
            "model": self.model,
            "experts": self.experts,
            "optimizer": self.optimizer,
            "top": self.top,
            "dict": {"a": [self.inside]},
            "object": self.object,
        }
        first, expert = self.model[0].weight, self.experts.weight
        self.places = {
            "params/model/0.weight/value": first.detach(),
            "params/model/0.weight/exp_avg": self.optimizer.state[first]["exp_avg"],
            "params/model/1.running_mean/value": self.model[1].running_mean,
            "params/experts/weight/value": expert.to_local().detach(),
            "params/experts/weight/exp_avg_sq": self.optimizer.state[expert]["exp_avg_sq"].to_local(),
            "extra/top": self.top,
            "extra/dict/a/0": self.inside,
            "extra/object/total": self.object.total,
        }


def go_undeclared(rank: int, world_size: int, root: str) -> dict[str, Any]:
    job, rounds = Undeclared(), Rounds(pytest.MonkeyPatch())
    seen: dict[str, Any] = {"found": {}, "sound": []}
    for way in ("blocking", "async"):
        seen["sound"] += [tried(job.state, f"{root}/{way}-{n}", step=n)["error"] for n in range(2)]
        rounds.taken()
        seen["sound"].append(tried(job.state, f"{root}/{way}-again", step=2)["error"])
        seen[way] = rounds.taken()
        for number, (place, tensor) in enumerate(job.places.items()):
            before = tensor.clone()
            if rank >= 2:
                tensor += 1
            for replicas in ("owner", "verify", "sample"):
                path = f"{root}/{way}-{number}-{replicas}"
                seen["found"][way, place, replicas] = tried(job.state, path, step=3, replicas=replicas)["error"]
            tensor.copy_(before)
            seen["sound"].append(tried(job.state, f"{root}/{way}-{number}-mended", step=4)["error"])
    run = ek.Run(f"{root}/run", job.state)
    run.restore()
    seen["sound"] += [str(run.save(step).exception(LIMIT_S) or "") for step in (1, 2)]
    if rank == 1:
        job.top += 1
    seen["run"] = str(run.save(3).exception(LIMIT_S))
    run.close()
    mesh = init_device_mesh("cpu", (world_size,))
    declared = {"top": job.top}
    seen["declared"] = [tried(declared, f"{root}/mesh-{r}", mesh=mesh, replicas=r)["error"] for r in ("owner", "verify")]
    return seen


@pytest.mark.ranks
def test_what_nobody_declared_is_compared_in_every_save(tmp_path: Path) -> None:
    """[SAVE-69] Each kind of tensor drifts on two ranks of four after saves in which all was alike."""
    for seen in run_ranks(go_undeclared, WORLD, str(tmp_path), timeout_s=180.0):
        assert set(seen["sound"]) == {""}
        assert len(seen["found"]) == 2 * 8 * 3
        for (_, place, _), message in seen["found"].items():
            assert f"array {place}: ranks 0 and 2 hold different contents under this name" in message
            assert message.count("array ") == (2 if "experts" in place else 1)  # its two shards
            assert "mesh=" in message
        assert "extra/top: ranks 0 and 1 hold different contents" in seen["run"]
        assert "on ranks [0, 2, 3] and [1]" in seen["run"]
        assert (seen["blocking"], seen["async"]) == (("prepare", "write"), ("prepare",))
        trusted, verified = seen["declared"]
        assert trusted == ""
        assert "extra/top [0:2] on ranks [0, 2, 3] and [1]" in verified
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{way}-{name}" for way in ("blocking", "async") for name in ("0", "1", "again", *(f"{n}-mended" for n in range(8)))),
        "run",
        "mesh-owner",
    }


def go_buffers(rank: int, world_size: int, root: str) -> dict[str, Any]:
    models = {
        "ddp": DistributedDataParallel(nn.BatchNorm1d(3)),
        "ddp that keeps nothing equal": DistributedDataParallel(nn.BatchNorm1d(3), broadcast_buffers=False),
        "fully_shard": fully_shard(nn.Sequential(nn.Linear(3, 3), fully_shard(nn.BatchNorm1d(3)))),
        "fully_shard of children only": fully_shard(nn.Sequential(fully_shard(nn.Linear(3, 3)), _Counter())),
    }
    seen: dict[str, Any] = {}
    for name, model in models.items():
        for way in ("blocking", "async"):
            place = f"{root}/{name.replace(' ', '-')}-{way}"
            seen[name, way, "alike"] = [tried({"m": model}, f"{place}-{n}", replicas="verify") for n in range(2)]
            for buffer in model.buffers():
                buffer += rank
            for replicas in ("owner", "verify"):
                seen[name, way, replicas] = tried({"m": model}, f"{place}-{replicas}", replicas=replicas)
            for buffer in model.buffers():
                buffer -= rank
    return seen


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(()))


@pytest.mark.ranks
@WAYS
def test_buffers_may_differ(buffers: tuple[Path, list[dict[str, Any]]], way: str) -> None:
    """[SAVE-67, SAVE-70] The first rank's is saved, and a note of rank 0 names what differs; of DDP, which makes them equal
    in the next forward, when that is asked for."""
    root, all_seen = buffers
    for name in sorted({name for name, _, _ in all_seen[0]}):
        for rank, seen in enumerate(all_seen):
            assert [one["notes"] for one in seen[name, way, "alike"]] == [(), ()]
            for replicas in ("owner", "verify"):
                assert seen[name, way, replicas]["error"] == ""
                said = " ".join(seen[name, way, replicas]["notes"])
                noted = rank == 0 and (replicas == "verify" or name != "ddp")
                assert ("running_mean" in said and "on ranks [0] and [1]" in said) is noted, (name, replicas, said)
        saved = ek.open(root / f"{name.replace(' ', '-')}-{way}-owner").arrays
        inside = {"fully_shard": "1.", "fully_shard of children only": "1."}.get(name, "")
        assert not np.any(saved[f"params/m/{inside}running_mean/value"][...])


@pytest.fixture(scope="module")
def buffers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("buffers")
    return root, run_ranks(go_buffers, 2, str(root), timeout_s=120.0)


# -- several sets that hold one array, and ways to stage -----------------------------------------------------------------


def go_sets(rank: int, world_size: int, root: str) -> dict[str, Any]:
    """2 × 2 ranks: data parallel along the first axis; along the second nobody says that ranks hold the same."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    models = {
        "ddp": DistributedDataParallel(nn.BatchNorm1d(3), process_group=mesh.get_group("dp")),
        "fully_shard": fully_shard(nn.BatchNorm1d(3), mesh=mesh["dp"]),
    }
    coordinate = mesh.get_coordinate()
    seen: dict[str, Any] = {}
    for name, model in models.items():
        before = model.state_dict()["module.running_mean" if name == "ddp" else "running_mean"]
        for axis, at in zip(("dp", "tp"), coordinate, strict=True):
            before += at
            seen[name, axis] = tried({"m": model}, f"{root}/{name}-{axis}", replicas="verify")
            before -= at
        seen[name, "mended"] = tried({"m": model}, f"{root}/{name}-mended", replicas="verify")
    return seen


@pytest.mark.ranks
def test_one_rank_of_each_set_speaks_and_differences_inside_a_set_are_judged_by_themselves(tmp_path: Path) -> None:
    """[SAVE-67, SAVE-69, SAVE-70]"""
    all_seen = run_ranks(go_sets, WORLD, str(tmp_path), timeout_s=120.0)
    for name in ("ddp", "fully_shard"):
        for rank, seen in enumerate(all_seen):
            notes = seen[name, "dp"]["notes"]
            assert [seen[name, way]["error"] for way in ("dp", "mended")] == ["", ""]
            assert len(notes) == (1 if rank == 0 else 0)
            for note in notes:
                assert "on ranks [0] and [2]" in note
                assert "on ranks [1] and [3]" in note
            assert "running_mean/value: ranks 0 and 1 hold different contents" in seen[name, "tp"]["error"]


def go_rounds(rank: int, world_size: int, root: str) -> dict[str, Any]:
    """Saves beside training that stage in portions, by a thread, or on one rank by a plan that another one has forgotten."""
    tensor = torch.zeros(3_000_000)
    options = {
        "in portions": ek.AsyncOptions(arena_nbytes=MIN_ARENA_NBYTES),
        "by a thread": ek.AsyncOptions(executor="thread"),
        "forgotten": ek.AsyncOptions(exit_limit_s=9.0),
    }
    seen: dict[str, Any] = {}
    for name, how in options.items():
        drifting, path = {"t": tensor}, f"{root}/{name}-async"
        sound = [tried(drifting, f"{path}-{n}", options=how)["error"] for n in range(2)]
        if name == "forgotten" and rank == 1:
            for structure in KNOWN._all():
                KNOWN.forget(saver_of(job_group(None), how), structure.table.digest)
        if rank == 1:
            tensor[-1] = 1.0
        drifted_one = tried(drifting, f"{path}-drifted", options=how)["error"]
        tensor.zero_()
        sound.append(tried(drifting, f"{path}-mended", options=how)["error"])
        seen[name] = (sound, drifted_one)
    return seen


@pytest.mark.ranks
def test_however_a_save_is_staged_it_is_compared(tmp_path: Path) -> None:
    """[SAVE-69]"""
    for seen in run_ranks(go_rounds, 2, str(tmp_path), timeout_s=120.0):
        for name in ("in portions", "by a thread", "forgotten"):
            sound, drifted_one = seen[name]
            assert sound == ["", "", ""], name
            assert "array extra/t: ranks 0 and 1 hold different contents" in drifted_one, name
