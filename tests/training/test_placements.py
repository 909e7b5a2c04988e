"""Held arrays of real gloo ranks: each box, cut out of the dense tensor by hand, is the local tensor; all boxes of an
array cover it. `full_tensor()` is no oracle here: it is wrong for uneven strided shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest
import torch
from dense_models import cut, dense, filled, mlp, tensor_parallel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.arrays import ArrayId, Box, Mesh
from elastickpt.layout.algebra import prove_coverage
from elastickpt.layout.placement import replica_ranks
from elastickpt.training.dtensors import JobView, hold, holders_of
from elastickpt.training.held import HeldArray
from elastickpt.training.modules import hold_module
from elastickpt.training.parallel import module_of
from elastickpt.training.parameters import Identities
from tools.gloo_ranks import run_ranks

pytestmark = pytest.mark.ranks

Held = dict[str, tuple[HeldArray, ...]]


def held_of(model: object, job: JobView) -> tuple[HeldArray, ...]:
    return hold_module("model", model, job=job, identities=Identities()).arrays


class Wrapped(nn.Module):
    """A model with children that are really called as wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)
        self._orig_mod = nn.BatchNorm1d(2)


def check(ranks: Sequence[Held], label: str) -> dict[str, list[HeldArray]]:
    """Asserts the two laws for every array under `label`, and returns what each rank holds, by name."""
    by_name: dict[str, list[HeldArray]] = defaultdict(list)
    first: dict[str, dict[tuple[int, ...], Box]] = defaultdict(dict)
    for rank, held in enumerate(ranks):
        for array in held.get(label, ()):
            name = array.spec.id.name
            assert torch.equal(array.tensor.float(), cut(name, array.spec.shape, array.box)), (label, name, rank)
            by_name[name].append(array)
            group: tuple[int, ...] = ()  # an undeclared one is equal everywhere, as was just seen
            if array.sharing == "placed":
                assert array.mesh is not None
                group = replica_ranks(array.mesh, array.placements, rank)
            elif array.sharing == "declared":
                group = array.replicas
            assert rank in group or array.sharing == "undeclared"
            assert first[name].setdefault(group, array.box) == array.box
    for name, boxes in first.items():
        report = prove_coverage(by_name[name][0].spec.shape, list(boxes.values()))
        assert not report.gaps, (label, name)
        assert not report.overlaps, (label, name)
    return dict(by_name)


def rows(arrays: Iterable[HeldArray]) -> list[tuple[int, int]]:
    return [(array.box.start[0], array.box.stop[0]) for array in arrays]


def _two_ranks(rank: int, world_size: int) -> Held:
    job = JobView(rank, world_size)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    gathered = fully_shard(mlp(5, 3), reshard_after_forward=False, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    with torch.no_grad():
        gathered(torch.ones(2, 5))
    assert not isinstance(next(gathered.parameters()), DTensor)  # the gathered copy is registered now
    ignoring = filled(nn.Linear(3, 2))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["bias"])
    declared = JobView(rank, world_size, Mesh("dp", ("dp",), (2,), (0, 1)))
    return {
        "plain": held_of(mlp(5, 3), job),
        "plain under mesh=": held_of(mlp(5, 3), declared),
        "ddp": held_of(DistributedDataParallel(filled(Wrapped())), job),
        "ddp over compile": held_of(DistributedDataParallel(torch.compile(mlp(5, 3))), job),
        "ddp ignoring": held_of(DistributedDataParallel(ignoring), job),
        "gathered": held_of(gathered, job),
        "tp": held_of(tensor_parallel(mlp(4, 6), mesh), job),
        "tp uneven": held_of(tensor_parallel(mlp(4, 101), mesh), job),
        "tp under mesh=": held_of(tensor_parallel(mlp(4, 6), mesh), declared),
    }


def test_two_ranks() -> None:
    ranks = run_ranks(_two_ranks, 2)
    plain = [array for held in ranks for array in held["plain"]]
    assert {(array.sharing, array.replicas) for array in plain} == {("undeclared", ())}
    for label in ("plain under mesh=", "ddp", "ddp over compile"):
        found = check(ranks, label)
        assert {(a.sharing, a.replicas) for arrays in found.values() for a in arrays} == {("declared", (0, 1))}
    assert list(check(ranks, "ddp")) == [
        "module.weight",
        "module.bias",
        "_orig_mod.weight",
        "_orig_mod.bias",
        "_orig_mod.running_mean",
        "_orig_mod.running_var",
        "_orig_mod.num_batches_tracked",
    ]
    assert [a.role for held in ranks for a in held["ddp"]].count("buffer") == 6
    assert list(check(ranks, "ddp over compile")) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert [a.sharing for a in ranks[0]["ddp ignoring"]] == ["declared", "undeclared"]

    gathered = check(ranks, "gathered")
    assert rows(gathered["0.weight"]) == [(0, 2), (2, 3)]
    assert {a.spec.dtype for arrays in gathered.values() for a in arrays} == {"float32"}

    column, row = (check(ranks, "tp")[name] for name in ("0.weight", "2.weight"))
    assert [a.box for a in column] == [Box((0, 0), (3, 4)), Box((3, 0), (6, 4))]
    assert [a.box for a in row] == [Box((0, 0), (4, 3)), Box((0, 3), (4, 6))]
    assert column[0].mesh == Mesh("tp", ("tp",), (2,), (0, 1))
    assert (column[0].placements, row[0].placements) == (("S(0)",), ("S(1)",))
    assert rows(check(ranks, "tp uneven")["0.weight"]) == [(0, 51), (51, 101)]
    norms = [a for held in ranks for a in held["tp"] if a.spec.id.name.startswith("1.")]
    assert {a.sharing for a in norms} == {"undeclared"}
    norms = check(ranks, "tp under mesh=")["1.weight"]
    assert {(a.sharing, a.replicas) for a in norms} == {("declared", (0, 1))}


def _three_ranks(rank: int, world_size: int) -> Held:
    return {"fsdp": held_of(fully_shard(mlp(10, 2)), JobView(rank, world_size))}


def test_three_ranks_where_the_last_shard_of_two_rows_is_empty() -> None:
    found = check(run_ranks(_three_ranks, 3), "fsdp")
    assert rows(found["0.weight"]) == [(0, 1), (1, 2), (2, 2)]
    assert rows(found["2.weight"]) == [(0, 4), (4, 8), (8, 10)]
    assert found["0.weight"][2].tensor.shape == (0, 10)


def _four_ranks(rank: int, world_size: int) -> Held:
    job = JobView(rank, world_size)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    nine, many = (fully_shard(tensor_parallel(mlp(n, n), grid["tp"]), mesh=grid["dp"]) for n in (9, 101))
    declared = JobView(rank, world_size, Mesh("all", ("d",), (4,), (0, 1, 2, 3)))
    half = DeviceMesh("cpu", [0, 1])
    mine = [nn.ModuleDict({str(k): filled(nn.Linear(2, 2))}) for k in (rank, rank + 4)]
    for part in mine:
        filled(part)
    return {
        "fsdp": held_of(fully_shard(mlp(10, 3)), job),
        "hsdp": held_of(fully_shard(mlp(10, 3), mesh=grid), job),
        "tp4 uneven": held_of(tensor_parallel(mlp(6, 10), line), job),
        "tp x fsdp, 9": held_of(nine, declared),
        "tp x fsdp, 101": held_of(many, declared),
        "undeclared norm": held_of(nine[1], job),
        "tp x ddp": held_of(DistributedDataParallel(tensor_parallel(mlp(4, 6), grid["tp"]), device_mesh=grid["dp"]), declared),
        "half": hold(
            ArrayId("params", "model", "half", "value"),
            distribute_tensor(dense("half", (5, 2)), half, [Shard(1)]),
            role="parameter",
            job=job,
            holders=holders_of(job),
        ),
        "both axes": hold(
            ArrayId("params", "model", "both", "value"),
            distribute_tensor(dense("both", (10,)), grid, [Shard(0), Shard(0)]),
            role="parameter",
            job=job,
            holders=holders_of(job),
        ),
        "two parts a rank": held_of(mine, job),
    }


def test_four_ranks() -> None:
    ranks = run_ranks(_four_ranks, 4)
    fsdp = check(ranks, "fsdp")
    assert rows(fsdp["2.weight"]) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert rows(fsdp["0.bias"]) == [(0, 1), (1, 2), (2, 3), (3, 3)]

    hsdp = check(ranks, "hsdp")["2.weight"]
    assert rows(hsdp) == [(0, 5), (5, 10), (0, 5), (5, 10)]
    assert (hsdp[0].mesh, hsdp[0].placements) == (Mesh("dp.tp", ("dp", "tp"), (2, 2), (0, 1, 2, 3)), ("R", "S(0)"))

    uneven = check(ranks, "tp4 uneven")
    assert rows(uneven["0.weight"]) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [a.box.shape for a in uneven["2.weight"]] == [(6, 3), (6, 3), (6, 3), (6, 1)]

    # Rank = 2 dp + tp. tp=0 has rows 0..5 of 9, tp=1 rows 5..9; FSDP2 then cuts each in two.
    nine = check(ranks, "tp x fsdp, 9")["0.weight"]
    assert rows(nine) == [(0, 3), (5, 7), (3, 5), (7, 9)]
    assert nine[0].placements == ("_S(0)", "S(0)")
    assert rows(check(ranks, "tp x fsdp, 101")["0.weight"]) == [(0, 26), (51, 76), (26, 51), (76, 101)]
    assert check(ranks, "tp x fsdp, 101")["2.weight"][3].box == Box((51, 51), (101, 101))

    # A norm that tensor parallelism leaves whole is cut by FSDP2 in each tp rank; along tp it is repeated as declared.
    norm = check(ranks, "tp x fsdp, 9")["1.weight"]
    assert rows(norm) == [(0, 5), (0, 5), (5, 9), (5, 9)]
    assert norm[0].placements == ("S(0)", "R")
    assert [held["undeclared norm"][0].mesh.name for held in ranks] == ["dp@0-2", "dp@1-3", "dp@0-2", "dp@1-3"]

    lifted = check(ranks, "tp x ddp")["0.weight"]
    assert rows(lifted) == [(0, 3), (3, 6), (0, 3), (3, 6)]
    assert (lifted[0].mesh, lifted[0].placements) == (Mesh("dp.tp", ("dp", "tp"), (2, 2), (0, 1, 2, 3)), ("R", "S(0)"))

    assert [len(held["half"]) for held in ranks] == [1, 1, 0, 0]
    assert ranks[0]["half"][0].mesh == Mesh("mesh@0-1", ("d0",), (2,), (0, 1))
    check(ranks, "half")
    assert rows(check(ranks, "both axes")["both"]) == [(0, 3), (3, 5), (5, 8), (8, 10)]
    assert [[a.spec.id.name for a in held["two parts a rank"]] for held in ranks] == [
        [f"{k}.{name}" for k in (rank, rank + 4) for name in ("weight", "bias")] for rank in range(4)
    ]


def _strided(rank: int, world_size: int) -> tuple[Box, bool]:
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    vocabulary = parallelize_module(filled(nn.Linear(1, 50_257, bias=False)), mesh["tp"], ColwiseParallel())
    (held,) = held_of(fully_shard(vocabulary, mesh=mesh["dp"]), JobView(rank, world_size))
    return held.box, torch.equal(held.tensor, cut("weight", (50_257, 1), held.box))


def test_a_vocabulary_of_50257_rows_on_tp2_x_fsdp4_is_cut_as_torch_cuts_it() -> None:
    """The rows of which `compute_local_shape_and_global_offset` says 6,281 + 6,281."""
    boxes, equal = zip(*run_ranks(_strided, 8), strict=True)
    assert [box.shape[0] for box in boxes] == [6283, 6282, 6283, 6282, 6283, 6282, 6280, 6282]
    assert all(equal)
    assert not prove_coverage((50_257, 1), boxes).gaps


def _refused(rank: int, world_size: int) -> list[str]:
    job = JobView(rank, world_size)
    mesh = init_device_mesh("cpu", (2,))
    local, whole = torch.ones(2, 4), torch.Size((4, 4))
    said = []
    for tensor in (
        DTensor.from_local(local, mesh, [Partial()], run_check=False),
        DTensor.from_local(local, mesh, [_StridedShard(0, split_factor=3)], run_check=False),
        DTensor.from_local(local[1:], mesh, [Shard(0)], run_check=False, shape=whole, stride=(4, 1)),
    ):
        array = ArrayId("extra", "state", "x", "")
        with pytest.raises(LayoutUnsupported) as caught:
            hold(array, tensor, role="other", job=job, holders=holders_of(job))
        said.append(caught.value.message)
    return said


def test_placements_without_a_box_are_refused_by_name() -> None:
    first, second = run_ranks(_refused, 2)
    assert "extra/state/x is placed as P(sum) on axis 0" in first[0]
    assert "expected split factor 1" in first[1]
    assert second[2] == ("array extra/state/x: its box [2:4, 0:4] has shape (2, 4), this rank's local tensor has shape (1, 4)")


def _stages(rank: int, world_size: int) -> tuple[list[str], bool]:
    from torch.distributed.pipelining import PipelineStage

    layers = [nn.ModuleDict({str(k): nn.Linear(2, 2)}) for k in (rank, rank + 2)]
    stages = [
        PipelineStage(layer, rank + 2 * n, 4, torch.device("cpu"), input_args=torch.ones(1, 2), output_args=torch.ones(1, 2))
        for n, layer in enumerate(layers)
    ]
    one = held_of(stages[0], JobView(rank, world_size))
    both = held_of(stages, JobView(rank, world_size))
    return [a.spec.id.name for a in both], module_of(stages[0]) is layers[0] and len(one) == 2


def test_pipeline_stages_are_held_under_their_own_names() -> None:
    names, single = zip(*run_ranks(_stages, 2), strict=True)
    assert names == (["0.weight", "0.bias", "2.weight", "2.bias"], ["1.weight", "1.bias", "3.weight", "3.bias"])
    assert single == (True, True)
