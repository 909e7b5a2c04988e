"""Every reader, fed with files that are not what they were: it ends in a listing or a typed error, in bounded memory.

[FOR-15]
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from written import write

from elastickpt.errors import CheckpointError
from elastickpt.foreign.dcp_plan import plan_dcp
from elastickpt.foreign.file_plans import NewTensor
from elastickpt.foreign.folder import open_folder
from elastickpt.foreign.formats import find_source, read_foreign
from elastickpt.foreign.pickle_values import Instance
from elastickpt.foreign.tensor_bytes import read_tensor
from elastickpt.foreign.torch_archive import plan_torch_archive

MAX_NBYTES = 64 << 20


def torch_file(folder: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, folder / "a.pt")


def megatron(folder: Path) -> None:
    for tp in (0, 1):
        place = folder / "iter_0000003" / f"mp_rank_{tp:02d}"
        place.mkdir(parents=True)
        args = argparse.Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=1)
        value = {"args": args, "iteration": 3, "model": {"a": torch.ones(2, 2)}, "checkpoint_version": 3.0}
        torch.save(value, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")


def dcp_folder(folder: Path) -> None:
    dcp.save({"model": {"a": torch.ones(4, 2), "b": torch.zeros(())}, "step": 3}, checkpoint_id=folder)


def safetensors(folder: Path) -> None:
    save_file({"a": torch.ones(3, 2), "b": torch.zeros(0)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.ones(3)}, folder / "model-00002-of-00002.safetensors")
    names = {"a": 1, "b": 1, "c": 2}
    places = ", ".join(f'"{name}": "model-0000{k}-of-00002.safetensors"' for name, k in names.items())
    (folder / "model.safetensors.index.json").write_text(f'{{"metadata": {{}}, "weight_map": {{{places}}}}}')
    (folder / "config.json").write_text('{"n_layer": 3, "inner": {"x": [1, 2]}}')


MAKERS: dict[str, Callable[[Path], None]] = {
    "torch": torch_file,
    "megatron": megatron,
    "dcp": dcp_folder,
    "safetensors": safetensors,
}


def listed(folder: Path) -> None:
    """Lists a source and reads all its tensors, as a conversion does."""
    found = read_foreign(find_source(open_folder(folder)))
    opened = open_folder(found.folder)
    stored = [piece.stored for one in found.wholes for piece in one.pieces]
    stored += [one.stored for rank in found.ranks for one in rank.tensors]
    for one in stored:
        with opened.opened(one.storage.file) as file:
            assert len(read_tensor(file.reader, one)) == one.nbytes


@pytest.fixture(scope="module", params=MAKERS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(str(request.param))
    MAKERS[request.param](folder)
    listed(folder)
    return folder


MUTATIONS = st.tuples(
    st.integers(0, 1 << 30), st.integers(0, 1 << 30), st.sampled_from(["flip", "byte", "cut", "insert", "remove", "big"])
)


def mutated(data: bytearray, at: int, number: int, how: str) -> None:
    at %= max(len(data), 1)
    if how == "flip" and data:
        data[at] ^= 1 << number % 8
    elif how == "byte" and data:
        data[at] = number % 256
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = number.to_bytes(4, "little")
    elif how == "remove":
        del data[at : at + number % 64]
    elif how == "big":
        data[at : at + 8] = b"\xff" * (number % 8 + 1)


def tried(source: Path, folder: Path, changes: list[tuple[int, tuple[int, int, str]]]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for which, change in changes:
        path = files[which % len(files)]
        data = bytearray(path.read_bytes())
        mutated(data, *change)
        path.write_bytes(data)
    tracemalloc.start()
    try:
        listed(folder)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MAX_NBYTES


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 9), MUTATIONS), min_size=1, max_size=3))
def test_a_mutated_source_ends_in_a_listing_or_a_typed_error(sound, tmp_path, changes) -> None:
    tried(sound, tmp_path / "x", changes)


@pytest.mark.long
def test_bytes_all_over_every_file_may_be_others(sound, tmp_path) -> None:
    for which, path in enumerate(sorted(path for path in sound.rglob("*") if path.is_file())):
        for at in range(0, path.stat().st_size, 1 + path.stat().st_size // 200):
            for byte in (0, 255, path.read_bytes()[at] ^ 1):
                tried(sound, tmp_path / "x", [(which, (at, byte, "byte"))])


WORDS = st.sampled_from(
    ["model", "model0", "optimizer", "state", "param_groups", "params", "param_names", "args", "step", "iteration", "a.weight"]
) | st.sampled_from(["state.a.exp_avg", "param_groups.a.lr", "x._extra_state", "fp32_from_fp16_params", "rng_state"])
LEAVES = (
    st.sampled_from([NewTensor("a", "float32", (2, 3)), NewTensor("b", "uint8", ()), NewTensor("c", "bfloat16", (0,))])
    | st.none()
    | st.integers(-1, 3)
    | st.floats(0, 1)
    | WORDS
    | st.just(Instance("argparse.Namespace", (), {"tensor_model_parallel_size": 1}))
    | st.just(Instance("torch._utils._rebuild_sparse_tensor", (1, 2)))
    | st.just(Instance("numpy.dtype", ("f4", False, True)))
    | st.binary(max_size=3)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(WORDS | st.integers(0, 2), inner, max_size=4)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(WORDS, VALUES, max_size=4), which=st.sampled_from(["torch", "megatron", "dcp"]))
def test_a_sound_file_with_any_value_in_it_ends_in_a_listing_or_a_typed_error(tmp_path, value, which) -> None:
    """Values that have the right words in the wrong places."""
    folder = tmp_path / "x"
    shutil.rmtree(folder, ignore_errors=True)
    place = folder / "mp_rank_00" if which == "megatron" else folder
    place.mkdir(parents=True)
    data = {"a": bytes(24), "b": b"\1", "c": b""}
    with contextlib.suppress(CheckpointError):
        plans = plan_dcp(value) if which == "dcp" else (plan_torch_archive("model_optim_rng.pt", value),)
        for plan in plans:
            write(plan, place, data)
        listed(folder)
