"""Folders of torch.distributed.checkpoint: written by real ranks at several layouts, and ones that are wrong. [FOR-60..64]"""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import dcp_jobs
import pytest
import torch
import torch.distributed.checkpoint as dcp
from dense import bits, whole_of
from torch.distributed.checkpoint.metadata import Metadata

from elastickpt.cli.main import main
from elastickpt.errors import (
    CheckpointError,
    CoverageGap,
    CoverageOverlap,
    Malformed,
    MissingFile,
    StructureConflict,
    Unsafe,
    Unsupported,
)
from elastickpt.foreign.folder import open_folder
from elastickpt.foreign.formats import find_source, read_foreign
from elastickpt.foreign.listing import ForeignCheckpoint
from tools.gloo_ranks import run_ranks


def read(path: Path) -> ForeignCheckpoint:
    return read_foreign(find_source(open_folder(path)))


def of_torch(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.contiguous().numpy().tobytes()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "world_size", "form"),
    [("fsdp", 3, "plain"), ("fsdp", 2, "flat"), ("tp fsdp", 4, "plain"), ("hsdp", 4, "root"), ("fsdp", 2, "app")],
)
def test_what_ranks_saved_is_put_together(tmp_path, layout, world_size, form) -> None:
    wanted = run_ranks(dcp_jobs.save, world_size, str(tmp_path / "c"), layout, form)[0]
    found = read(tmp_path / "c")
    made = {f"{one.name}|{one.state}": bits(whole_of(found, one)) for one in found.wholes}
    assert made == {name: of_torch(tensor) for name, tensor in wanted.items()}
    items = {"app": {"app.model", "app.optim"}}.get(form, {"model", "optimizer"})
    assert {one.item for one in found.wholes} == items
    (group,) = found.groups
    assert sorted(group.members) == ["down.bias", "down.weight", "up.bias", "up.weight"]
    assert (group.options["lr"], group.options["amsgrad"]) == (0.1, True)
    assert not found.not_carried


@pytest.mark.ranks
@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 3), ("tp fsdp", 4), ("hsdp", 4)])
def test_one_file_with_one_chunk_a_tensor_is_read_by_torch_at_any_layout(tmp_path, layout, world_size) -> None:
    """[FOR-67]"""
    wanted = run_ranks(dcp_jobs.save, 4, str(tmp_path / "s"), "tp fsdp", "plain")[0]
    for out in (["u"], ["d", "--to", "dcp"]):
        source = tmp_path / ("s" if out[0] == "u" else "u")
        assert main(["convert", str(source), str(tmp_path / out[0]), *out[1:], "--quiet"]) == 0
    found = run_ranks(dcp_jobs.loaded, world_size, str(tmp_path / "d"), layout)[0]
    assert found.keys() == wanted.keys()
    assert {name: of_torch(one) for name, one in found.items()} == {name: of_torch(one) for name, one in wanted.items()}


def test_an_optimizers_own_numbers_stay_numbers(tmp_path) -> None:
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    dcp.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path)
    found = read(tmp_path)
    assert {(one.name, one.state) for one in found.wholes if one.item == "optimizer"} == {
        (0, "momentum_buffer"),
        (1, "momentum_buffer"),
    }
    assert found.groups[0].members == (0, 1)


def change(folder: Path, edit: Callable[[Metadata], None]) -> None:
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())  # noqa: S301
    edit(found)
    path.write_bytes(pickle.dumps(found))


def entry(found: Metadata, key: str = "model.a") -> object:
    return next(place for index, place in found.storage_data.items() if index.fqn == key)


def overlapping(found: Metadata) -> None:
    chunks = found.state_dict_metadata["model.a"].chunks
    chunks.append(chunks[0])


def gap(found: Metadata) -> None:
    found.state_dict_metadata["model.a"].size = torch.Size([5, 2])


def beyond(found: Metadata) -> None:
    found.state_dict_metadata["model.a"].size = torch.Size([3, 2])


def other_shape(found: Metadata) -> None:
    found.state_dict_metadata["model.a"].size = torch.Size([2, 4])
    found.state_dict_metadata["model.a"].chunks[0].sizes = torch.Size([2, 4])


def other_type(found: Metadata) -> None:
    found.state_dict_metadata["model.a"].properties.dtype = torch.float64


def outside(found: Metadata) -> None:
    entry(found).relative_path = "../../etc/passwd"


def absent(found: Metadata) -> None:
    entry(found).relative_path = "__7_0.distcp"


def transformed(found: Metadata) -> None:
    entry(found).transform_descriptors = ["zstd"]


def beyond_the_file(found: Metadata) -> None:
    entry(found).length = 1 << 40


def other_item(found: Metadata) -> None:
    entry(found).offset, entry(found).length = entry(found, "step").offset, entry(found, "step").length


def nowhere(found: Metadata) -> None:
    found.storage_data = {index: place for index, place in found.storage_data.items() if index.fqn != "model.a"}


def with_program(found: Metadata) -> None:
    found.planner_data["model.a"] = shutil.rmtree


def laughing(found: Metadata) -> None:
    shared: list[object] = []
    for _ in range(18):
        shared = [shared, shared]
    found.planner_data["model.a"] = (shared,)


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (overlapping, CoverageOverlap),
        (gap, CoverageGap),
        (beyond, Malformed),
        (other_shape, StructureConflict),
        (other_type, StructureConflict),
        (outside, Unsafe),
        (absent, MissingFile),
        (transformed, Unsupported),
        (beyond_the_file, Malformed),
        (other_item, StructureConflict),
        (nowhere, Malformed),
        (with_program, Unsafe),
        (laughing, Malformed),
    ],
)
def test_metadata_that_does_not_fit_its_files_is_refused(tmp_path, edit, error) -> None:
    """[FOR-3, FOR-5]"""
    dcp.save({"model": {"a": torch.ones(4, 2), "b": torch.zeros(())}, "step": 3}, checkpoint_id=tmp_path)
    change(tmp_path, lambda found: None)
    read(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 500
    assert re.search(r"model\.a|__7|passwd|rmtree", str(caught.value))


def test_a_missing_file_is_named(tmp_path) -> None:
    dcp.save({"model": {"a": torch.ones(4, 2)}}, checkpoint_id=tmp_path)
    next(tmp_path.glob("*.distcp")).unlink()
    with pytest.raises(MissingFile, match="distcp"):
        read(tmp_path)
