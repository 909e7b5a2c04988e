"""Files that are written here, read by the libraries whose format they have.

[FOR-37..39, FOR-47..49, FOR-67, FOR-90..97]
"""

from __future__ import annotations

import argparse
import json
import zipfile
import zlib
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from dense import bits, whole_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from written import write

from elastickpt.errors import Refused, StructureConflict, ValueNotCarried
from elastickpt.foreign.assemble import NewArray, NewState, assemble
from elastickpt.foreign.dcp_plan import plan_dcp
from elastickpt.foreign.file_plans import NewTensor, combined_crc32
from elastickpt.foreign.folder import open_folder
from elastickpt.foreign.formats import find_source, read_foreign
from elastickpt.foreign.listing import ParamGroup, TiedName
from elastickpt.foreign.pickle_values import ElementType, Instance
from elastickpt.foreign.safetensors_file import DTYPE_NAMES
from elastickpt.foreign.safetensors_plan import plan_safetensors
from elastickpt.foreign.torch_archive import plan_torch_archive
from elastickpt.format.arrays import DTYPES
from elastickpt.format.values import ArrayReference, ArrayValue

VALUE = {
    "numbers": [0, 255, 256, -1, 1 << 31, -(1 << 31), 1 << 200, -(1 << 200), 0.1, float("inf"), True, False, None],
    "text": ("", "é", "x" * 300, "x" * 300),
    "many": list(range(2500)),
    "members": {k: str(k) for k in range(2500)},
    "kinds": {"set": {1, 2}, "bytes": b"\x00\xff", "complex": 1 - 2j, "ordered": OrderedDict(a=1), "count": Counter("aab")},
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
}


def tensor(dtype: str, shape: tuple[int, ...], seed: int) -> tuple[NewTensor, bytes]:
    made = NewTensor(f"{dtype}-{shape}-{seed}", dtype, shape)
    data = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, made.nbytes, np.uint8).tobytes()
    return made, data


def torch_bits(value: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    flat = value.contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() else flat
    return str(value.dtype).removeprefix("torch."), tuple(value.shape), bytes(raw.numpy().tobytes()) if flat.numel() else b""


def test_torch_reads_plain_values_as_they_were(tmp_path) -> None:
    path = write(plan_torch_archive("a.pt", VALUE), tmp_path, {})
    found = torch.load(path, weights_only=True)
    assert repr(found) == repr(VALUE)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_torch_reads_every_element_type(tmp_path, dtype) -> None:
    made = dict(tensor(dtype, shape, seed) for seed, shape in enumerate([(), (0, 3), (5,), (3, 1, 7)]))
    value = {one.key: one for one in made}
    path = write(plan_torch_archive("a.pt", value), tmp_path, {one.key: data for one, data in made.items()})
    found = torch.load(path, weights_only=True)
    for one, data in made.items():
        assert torch_bits(found[one.key]) == (dtype, one.shape, data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every checksum fits


def test_torch_shares_what_has_one_key_and_every_storage_is_aligned(tmp_path) -> None:
    one, data = tensor("float32", (4, 5), 1)
    plan = plan_torch_archive("a.pt", {"a": one, "b": one, "small": ArrayValue("int64", (), b"\7" + bytes(7), "torch")})
    assert len(plan.slots) == 1
    assert plan.slots[0].offset % 64 == 0
    found = torch.load(write(plan, tmp_path, {one.key: data}), weights_only=True, mmap=True)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert found["small"].item() == 7


def test_an_object_of_a_framework_is_written_for_that_framework(tmp_path) -> None:
    given = Instance("argparse.Namespace", (), {"layers": 4, "dtype": ElementType("bfloat16")})
    path = write(plan_torch_archive("a.pt", {"args": given}), tmp_path, {})
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(path, weights_only=True)["args"] == argparse.Namespace(layers=4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "value", [frozenset({1}), Instance("os.system", ("true",)), "\ud800", 1 << 4000, object(), ArrayReference("a", "b")]
)
def test_what_no_torch_file_holds_is_refused(value) -> None:
    with pytest.raises(ValueNotCarried):
        plan_torch_archive("a.pt", {"x": value})


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_of_parts_make_that_of_the_whole(first, second) -> None:
    assert combined_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_an_archive_beyond_32_bits_has_wide_records(tmp_path) -> None:
    """4 GiB of holes, then a small tensor behind them: torch and this reader find both."""
    big, small = NewTensor("big", "uint8", (1 << 32,)), tensor("float32", (3,), 1)
    plan = plan_torch_archive("a.pt", {"model": {"big": big, "small": small[0]}})
    path = tmp_path / "a.pt"
    with path.open("wb") as file:
        file.truncate(plan.nbytes)
        file.seek(plan.slots[1].offset)
        file.write(small[1])
        for offset, frame in plan.frames({}):
            file.seek(offset)
            file.write(frame)
    found = torch.load(path, weights_only=True, mmap=True)["model"]
    assert torch_bits(found["small"]) == ("float32", (3,), small[1])
    assert found["big"].shape == (1 << 32,)
    listed = {one.name: one for one in read_foreign(find_source(open_folder(path))).wholes}
    assert listed["small"].pieces[0].stored.start == plan.slots[1].offset
    assert listed["big"].pieces[0].stored.start == plan.slots[0].offset


@pytest.mark.long
def test_an_archive_of_many_records_has_a_wide_directory(tmp_path) -> None:
    made, data = tensor("uint8", (1,), 0)
    value = {str(k): NewTensor(str(k), "uint8", (1,)) for k in range(65_600)}
    path = write(plan_torch_archive("a.pt", {"model": value}), tmp_path, dict.fromkeys(value, data))
    assert len(torch.load(path, weights_only=True, mmap=True)["model"]) == 65_600
    assert made.nbytes == 1


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES.values()))
def test_safetensors_reads_every_element_type(tmp_path, dtype) -> None:
    made = dict(tensor(dtype, shape, seed) for seed, shape in enumerate([(), (0, 3), (5,), (3, 1, 7)]))
    (plan,) = plan_safetensors({one.key: one for one in made}, notes={"by": "a test"})
    path = write(plan, tmp_path, {one.key: data for one, data in made.items()})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "a test"}
    if dtype == "float8_e8m0fnu":
        return  # safetensors 0.8 has the type in its header, and torch's side of it not
    found = load_file(path)
    for one, data in made.items():
        assert torch_bits(found[one.key]) == (dtype, one.shape, data)


def test_safetensors_are_cut_by_size_in_order_with_an_index(tmp_path) -> None:
    made = dict(tensor("float32", (k,), k) for k in (10, 3, 4, 30, 1))
    names = {f"t{k}": one for k, one in enumerate(made)}
    plans = plan_safetensors(names, shard_nbytes=52)
    for plan in plans:
        write(plan, tmp_path, {one.key: data for one, data in made.items()})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = [f"model-0000{k}-of-00004.safetensors" for k in (1, 2, 3, 4)]
    assert index["weight_map"] == dict(zip(names, [files[0], files[0], files[1], files[2], files[3]], strict=True))
    assert index["metadata"]["total_size"] == sum(map(len, made.values()))
    found = read_foreign(find_source(open_folder(tmp_path)))
    assert {one.name: bits(whole_of(found, one))[1] for one in found.wholes} == {name: made[one] for name, one in names.items()}


def test_safetensors_tied_names_come_back_by_the_librarys_own_way(tmp_path) -> None:
    weight, data = tensor("float32", (4, 3), 3)
    (plan,) = plan_safetensors({"embed.weight": weight, "head.weight": weight})
    path = write(plan, tmp_path, {weight.key: data})
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    assert load_model(model, path) == (set(), [])
    assert torch_bits(model["head"].weight.detach()) == ("float32", (4, 3), data)
    found = read_foreign(find_source(open_folder(path)))
    assert found.tied == (TiedName("model", "head.weight", "embed.weight"),)


@pytest.mark.parametrize(("dtype", "size", "error"), [("complex128", 10, ValueNotCarried), ("float32", 0, Refused)])
def test_what_no_safetensors_file_holds_is_refused(dtype, size, error) -> None:
    with pytest.raises(error):
        plan_safetensors({"a": NewTensor("a", dtype, (1,))}, shard_nbytes=size)


def state() -> tuple[NewState, dict[str, bytes]]:
    """A model with tied names, an optimizer with two groups, a tensor of its own and plain values."""
    made = {
        name: tensor("float32", shape, seed)
        for seed, (name, shape) in enumerate(
            {"w|value": (5, 4), "b|value": (4,), "w|exp_avg": (5, 4), "b|exp_avg": (4,), "w|step": ()}.items()
        )
    }
    noise = tensor("uint8", (9,), 9)
    arrays = [
        NewArray("model" if name.endswith("value") else "optimizer", *name.split("|"), one) for name, (one, _) in made.items()
    ]
    groups = (ParamGroup("optimizer", ("b",), {"lr": 0.1}), ParamGroup("optimizer", ("w",), {"lr": 0.2, "betas": (0.9, 0.95)}))
    whole = NewState(
        arrays=(*arrays, NewArray("rng", "", "", noise[0])),
        groups=groups,
        tied=(TiedName("model", "head", "w"),),
        values={"/step": 7, "/scheduler": {"last_epoch": 7, "lrs": [0.1, 0.2]}},
    )
    return whole, {one.key: data for one, data in (*made.values(), noise)}


def test_torch_reads_a_whole_state(tmp_path) -> None:
    whole, data = state()
    found = torch.load(write(plan_torch_archive("a.pt", assemble(whole, keyed="number")), tmp_path, data), weights_only=True)
    assert list(found["model"]) == ["w", "b", "head"]
    assert found["model"]["head"].data_ptr() == found["model"]["w"].data_ptr()
    assert found["optimizer"]["param_groups"][1] == {"lr": 0.2, "betas": (0.9, 0.95), "params": [1], "param_names": ["w"]}
    assert list(found["optimizer"]["state"][1]) == ["exp_avg", "step"]
    assert (found["step"], found["scheduler"]["lrs"], found["rng"].dtype) == (7, [0.1, 0.2], torch.uint8)


def test_what_was_written_is_listed_as_it_was_given(tmp_path) -> None:
    whole, data = state()
    write(plan_torch_archive("a.pt", assemble(whole, keyed="number")), tmp_path, data)
    found = read_foreign(find_source(open_folder(tmp_path / "a.pt")))
    assert {(one.item, one.name, one.state) for one in found.wholes} == {
        (one.item, one.name, one.state) for one in whole.arrays
    }
    assert (found.groups, found.tied, dict(found.values), found.step) == (whole.groups, whole.tied, whole.values, 7)


def test_dcp_reads_a_whole_state(tmp_path) -> None:
    """Into a state of the same form, as a job does, and as a whole, without knowing anything of it."""
    whole, data = state()
    value = assemble(whole, keyed="name")
    for plan in plan_dcp(value):
        write(plan, tmp_path, data)
    target = {"model": {"w": torch.zeros(5, 4), "b": torch.zeros(4)}, "step": 0, "rng": torch.zeros(9, dtype=torch.uint8)}
    dcp.load(target, checkpoint_id=tmp_path)
    keys = {(one.item, one.name, one.state): one.tensor.key for one in whole.arrays}
    assert torch_bits(target["model"]["w"])[2] == data[keys["model", "w", "value"]]
    assert torch_bits(target["rng"])[2] == data[keys["rng", "", ""]]
    assert target["step"] == 7
    dcp_to_torch_save(tmp_path, tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert torch_bits(found["optimizer"]["state"]["w"]["exp_avg"])[2] == data[keys["optimizer", "w", "exp_avg"]]
    assert [group["params"] for group in found["optimizer"]["param_groups"]] == [["b"], ["w"]]
    assert found["scheduler"] == {"last_epoch": 7, "lrs": [0.1, 0.2]}


def test_dcp_is_listed_as_it_was_given(tmp_path) -> None:
    whole, data = state()
    for plan in plan_dcp(assemble(whole, keyed="name")):
        write(plan, tmp_path, data)
    found = read_foreign(find_source(open_folder(tmp_path)))
    made = {(one.item, one.name, one.state): bits(whole_of(found, one))[1] for one in found.wholes}
    wanted = {(one.item, one.name, one.state): data[one.tensor.key] for one in whole.arrays}
    assert made == {**wanted, ("model", "head", "value"): wanted["model", "w", "value"]}
    assert (found.groups, found.step) == (whole.groups, 7)


def test_two_things_at_one_place_are_refused() -> None:
    one, _ = tensor("float32", (1,), 0)
    with pytest.raises(StructureConflict):
        assemble(NewState((NewArray("a", "w", "value", one),), values={"/a": 3}), keyed="name")
    with pytest.raises(StructureConflict):
        plan_dcp({"a.b": one, "a": {"b": one}})
