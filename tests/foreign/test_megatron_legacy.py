"""The legacy layout of Megatron-LM: a real checkpoint, small ones of other shapes, and ones that are wrong.

[FOR-50..54, FOR-57, FOR-58]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense import array_of, bits
from written import write

from elastickpt.errors import CheckpointError, Malformed, MissingFile, NotACheckpoint, StructureConflict, Unsafe, Unsupported
from elastickpt.foreign.file_plans import NewTensor
from elastickpt.foreign.folder import open_folder
from elastickpt.foreign.formats import find_source, read_foreign
from elastickpt.foreign.listing import ForeignCheckpoint, ParamGroup
from elastickpt.foreign.megatron_plan import NewRank, plan_megatron_legacy


def read(path: Path, **asked: int) -> ForeignCheckpoint:
    return read_foreign(find_source(open_folder(path), **asked))


def test_a_real_checkpoint_lists_all_ranks_in_order(megatron_case) -> None:
    found = read(megatron_case.folder / "checkpoint")
    assert [rank.coordinate for rank in found.ranks] == [(("pp", p), ("tp", t)) for p in (0, 1) for t in (0, 1)]
    assert (found.step, found.constants["num_query_groups"], found.constants["params_dtype"]) == (3, 4, "float32")
    assert [one.name for one in found.not_carried] == ["rng_state"]
    assert [len(group.members) for group in found.ranks[-1].groups] == [9, 5]
    assert found.said == ("latest_checkpointed_iteration.txt says 3: iter_0000003 is read",)


def test_the_bytes_of_a_real_checkpoint_are_those_of_its_truth(megatron_case) -> None:
    """A vector that every tensor rank holds, and a matrix of which the ranks hold halves of the rows."""
    found = read(megatron_case.folder / "checkpoint")
    stored = {(rank.coordinate, one.name): one.stored for rank in found.ranks for one in rank.tensors if one.item == "model"}
    last = [(("pp", 1), ("tp", tp)) for tp in (0, 1)]
    norms = [array_of(found, stored[at, "decoder.final_layernorm.weight"]) for at in last]
    whole = np.concatenate([array_of(found, stored[at, "output_layer.weight"]) for at in last])
    assert bits(norms[0]) == bits(norms[1]) == bits(megatron_case.truth["decoder.final_layernorm.weight|value"])
    assert bits(whole[:101]) == bits(megatron_case.truth["output_layer.weight|value"])
    assert whole.shape == (128, 32)


def test_written_again_every_tensor_of_every_file_is_the_sources(megatron_case, tmp_path) -> None:
    """Of a whole real checkpoint, read by torch with the classes that its own files need."""
    source = megatron_case.folder / "checkpoint"
    found = read(source)
    ranks, data = [], {}
    for rank in found.ranks:
        made = {}
        for one in rank.tensors:
            made[one.item, one.name, one.state] = tensor = NewTensor(
                f"{rank.coordinate}{one.item}{one.name}{one.state}", one.stored.dtype, one.stored.shape
            )
            data[tensor.key] = bits(array_of(found, one.stored))[1]
        model = {name: tensor for (item, name, _), tensor in made.items() if item == "model"}
        states: dict[int, dict[str, object]] = {}
        for (item, name, state), tensor in made.items():
            if item == "optimizer":
                states.setdefault(name, {})[state] = tensor
        rest = {name[1:]: value for name, value in rank.values.items() if name != "/args"}
        args = rank.values["/args"]["state"]
        ranks.append(NewRank(rank.at("pp"), rank.at("tp"), (model,), states=states, groups=rank.groups, args=args, values=rest))
    for plan in plan_megatron_legacy(ranks, step=3):
        (tmp_path / plan.path).parent.mkdir(parents=True, exist_ok=True)
        write(plan, tmp_path, data)
    for path in sorted(source.rglob("*.pt")):
        same(load(path), load(tmp_path / path.relative_to(source)), "")


class Held:
    """What a class of Megatron is for torch here: something with its arguments."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self.arguments == other.arguments

    __hash__ = None


def load(path: Path) -> dict[str, object]:
    names = ("megatron.core.enums.ModelType", "megatron.core.transformer.enums.AttnBackend")
    numpy = ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct")
    allowed = [argparse.Namespace, np.ndarray, np.dtype, type(np.dtype("uint32")), *((Held, name) for name in names)]
    with torch.serialization.safe_globals([*allowed, *((np._core.multiarray._reconstruct, name) for name in numpy)]):
        return torch.load(path, weights_only=True)


def same(one: object, other: object, where: str) -> None:
    """All of `one` but the random states and entries without a tensor is in `other`, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
        assert one.dtype == other.dtype
    elif isinstance(one, dict):
        for key, value in one.items():
            if key != "rng_state" and value is not None:
                same(value, other[key], f"{where}/{key}")
    elif isinstance(one, argparse.Namespace):
        assert vars(one) == vars(other)
    else:
        assert one == other, where


def save(folder: Path, contents: dict[str, object], *, tp: int, pp: int | None, step: int = 4) -> Path:
    name = f"mp_rank_{tp:02d}" if pp is None else f"mp_rank_{tp:02d}_{pp:03d}"
    (folder / f"iter_{step:07d}" / name).mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
    path = folder / f"iter_{step:07d}" / name / "model_optim_rng.pt"
    torch.save(contents, path)
    return path


def contents(tp: int, pp: int, step: int = 4, **more: object) -> dict[str, object]:
    args = argparse.Namespace(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return {"args": args, "checkpoint_version": 3.0, "iteration": step, "model": {"a.weight": torch.ones(2, 3)}, **more}


def test_one_stage_has_folders_without_a_stage(tmp_path) -> None:
    for tp in range(3):
        save(tmp_path, contents(3, 1), tp=tp, pp=None)
    assert [rank.coordinate for rank in read(tmp_path).ranks] == [(("pp", 0), ("tp", tp)) for tp in range(3)]


def test_a_step_can_be_chosen_and_a_step_folder_stands_for_itself(tmp_path) -> None:
    for step in (4, 8):
        save(tmp_path, contents(1, 1, step), tp=0, pp=None, step=step)
    assert (read(tmp_path).step, read(tmp_path, step=4).step, read(tmp_path / "iter_0000004").step) == (8, 4, 4)
    with pytest.raises(NotACheckpoint, match="step 5"):
        read(tmp_path, step=5)


def test_a_converted_checkpoint_is_called_release(tmp_path) -> None:
    path = save(tmp_path, contents(1, 1, 0), tp=0, pp=None)
    path.parent.parent.rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert read(tmp_path).step == 0


def test_half_types_have_masters_by_the_optimizers_numbers(tmp_path) -> None:
    inner = {
        "state": {0: {"exp_avg": torch.ones(2), "step": 3}, 1: {"exp_avg": torch.ones(3)}},
        "param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}],
    }
    masters = [[torch.full((2,), 2.0)], [torch.full((3,), 3.0)]]
    optimizer = {"optimizer": inner, "fp32_from_fp16_params": masters, "grad_scaler": {"scale": 8.0}}
    save(tmp_path, contents(1, 1, optimizer=optimizer), tp=0, pp=None)
    (rank,) = read(tmp_path).ranks
    found = {(one.name, one.state): one.stored.shape for one in rank.tensors if one.item == "optimizer"}
    assert found == {(0, "exp_avg"): (2,), (1, "exp_avg"): (3,), (0, "master"): (2,), (1, "master"): (3,)}
    assert [(one.name, one.state, one.value) for one in rank.scalars] == [(0, "step", 3)]
    assert rank.values["/optimizer/grad_scaler"] == {"scale": 8.0}


def test_several_stages_of_a_rank_are_chunks(tmp_path) -> None:
    both = {"model0": {"a.weight": torch.ones(1)}, "model1": {"a.weight": torch.zeros(1), "b._extra_state": None}}
    save(tmp_path, {**both, "iteration": 4}, tp=0, pp=None)
    (rank,) = read(tmp_path).ranks
    assert [(one.name, one.chunk) for one in rank.tensors] == [("a.weight", 0), ("a.weight", 1)]
    assert rank.empty == ("b._extra_state",)


def test_written_ranks_of_half_types_and_chunks_are_listed_as_given(tmp_path) -> None:
    tensor = NewTensor("t", "bfloat16", (2,))
    master = NewTensor("m", "float32", (2,))
    rank = NewRank(
        0,
        0,
        ({"a": tensor}, {"a": tensor}),
        {0: {"exp_avg": master}},
        (ParamGroup("optimizer", (0,), {"lr": 0.1}),),
        {0: master},
    )
    for plan in plan_megatron_legacy([rank], step=12):
        (tmp_path / plan.path).parent.mkdir(parents=True, exist_ok=True)
        write(plan, tmp_path, {"t": bytes(4), "m": bytes(8)})
    (found,) = read(tmp_path).ranks
    assert [(one.item, one.name, one.state, one.chunk) for one in found.tensors] == [
        ("model", "a", "value", 0),
        ("model", "a", "value", 1),
        ("optimizer", 0, "exp_avg", 0),
        ("optimizer", 0, "master", 0),
    ]


def missing_rank(folder: Path) -> None:
    shutil.rmtree(folder / "iter_0000004" / "mp_rank_01_000")


def missing_file(folder: Path) -> None:
    (folder / "iter_0000004" / "mp_rank_01_000" / "model_optim_rng.pt").unlink()


def missing_stage(folder: Path) -> None:
    for tp in (0, 1):
        shutil.rmtree(folder / "iter_0000004" / f"mp_rank_{tp:02d}_001")


def doubled(folder: Path) -> None:
    save(folder, contents(2, 2), tp=0, pp=None)


def other_step(folder: Path) -> None:
    missing_rank(folder)
    save(folder, contents(2, 2), tp=1, pp=0)
    torch.save(contents(2, 2, step=5), folder / "iter_0000004" / "mp_rank_01_000" / "model_optim_rng.pt")


def far_rank(folder: Path) -> None:
    save(folder, contents(2, 2), tp=99, pp=0)


def tracker_elsewhere(folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("../../other")


def tracker_of_no_folder(folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("77")


def truncated(folder: Path) -> None:
    path = folder / "iter_0000004" / "mp_rank_01_001" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-40])


def no_model(folder: Path) -> None:
    torch.save({"iteration": 4}, folder / "iter_0000004" / "mp_rank_01_001" / "model_optim_rng.pt")


def old_version(folder: Path) -> None:
    path = folder / "iter_0000004" / "mp_rank_01_001" / "model_optim_rng.pt"
    torch.save(contents(2, 2) | {"checkpoint_version": 1.0}, path)


def foreign_class(folder: Path) -> None:
    path = folder / "iter_0000004" / "mp_rank_01_001" / "model_optim_rng.pt"
    torch.save({"model": {}, "run": shutil.rmtree}, path)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (missing_rank, MissingFile, "pp 0, tp 1"),
        (missing_file, MissingFile, "mp_rank_01_000"),
        (missing_stage, StructureConflict, "pipeline_model_parallel_size is 2"),
        (doubled, StructureConflict, "one and the same rank"),
        (other_step, StructureConflict, "of step 5"),
        (far_rank, MissingFile, "99"),
        (tracker_elsewhere, Unsafe, "not inside"),
        (tracker_of_no_folder, MissingFile, "iter_0000077"),
        (truncated, Malformed, "cut short"),
        (no_model, Malformed, "`model`"),
        (old_version, Unsupported, "checkpoint_version 1.0"),
        (foreign_class, Unsafe, "shutil.rmtree"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tmp_path, change, error, says) -> None:
    for tp in (0, 1):
        for pp in (0, 1):
            save(tmp_path, contents(2, 2), tp=tp, pp=pp)
    read(tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=says) as caught:
        read(tmp_path)
    assert type(caught.value) is error


@pytest.mark.parametrize("ranks", [[], [NewRank(0, 1, ())], [NewRank(0, 0, ()), NewRank(1, 1, ())]])
def test_ranks_that_are_no_whole_grid_are_not_written(ranks) -> None:
    with pytest.raises(StructureConflict):
        plan_megatron_legacy(ranks, step=1)
