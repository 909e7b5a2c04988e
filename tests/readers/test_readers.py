"""What `ek.save` writes is read by others, bit for bit, without elastickpt."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import elastickpt as ek
from elastickpt.layout import grid
from elastickpt.training.elements import host_elements

SCRIPT = Path(__file__).with_name("plain_reader.py")
CORE = ("float64", "float32", "float16", "int8", "int16", "int32", "int64", "uint8", "bool", "complex64", "complex128")
EXTENSION = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and the tensor that each of its arrays must be."""

    path: str
    tensors: Mapping[str, torch.Tensor]


def any_bits(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits, every NaN among them; 0 and 1 for bool."""
    generator = torch.Generator().manual_seed(len(dtype) + sum(shape))
    kind = getattr(torch, dtype)
    high = 2 if kind is torch.bool else 256
    nbytes = torch.empty(shape, dtype=kind).nbytes
    return torch.randint(0, high, (nbytes,), generator=generator, dtype=torch.uint8).view(kind).reshape(shape)


class Small(nn.Module):
    """Square matrices, repeated sizes and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(6, 6)
        self.cube = nn.Parameter(any_bits("float32", (4, 4, 4)))
        self.norm = nn.BatchNorm1d(6)


def _save(path: Path, dtypes: tuple[str, ...]) -> Saved:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    extra = {dtype: any_bits(dtype, (5, 7)) for dtype in dtypes}
    shapes = {"0d": torch.tensor(-0.0), "none": torch.zeros(0), "flat": torch.zeros(3, 0, 2), "turned": torch.randn(3, 5).T}
    ek.save({"model": model, "optimizer": optimizer, "dtypes": extra, "shapes": shapes}, path, step=1)
    tensors: dict[str, torch.Tensor] = {f"extra/dtypes/{name}": tensor for name, tensor in extra.items()}
    tensors |= {f"extra/shapes/{name}": tensor for name, tensor in shapes.items()}
    tensors |= {f"params/model/{name}/value": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for state in ("exp_avg", "exp_avg_sq"):
            tensors[f"params/model/{name}/{state}"] = optimizer.state[parameter][state]
    return Saved(str(path), tensors)


@pytest.fixture(scope="module", autouse=True)
def _small_chunks() -> Any:
    """Chunks of at most 64 bytes, so that every matrix here has several, those at the edges padded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "CHUNK_NBYTES", 64)
        yield


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return _save(tmp_path_factory.mktemp("core") / "step-1", CORE)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return _save(tmp_path_factory.mktemp("extended") / "step-1", CORE + EXTENSION)


def read_by(reader: str, saved: Saved, out: Path, keys: list[str] | None = None) -> dict[str, Any]:
    """What a reader in a process without elastickpt says; its arrays are bitwise the tensors."""
    keys = sorted(saved.tensors) if keys is None else keys
    command = [sys.executable, "-I", str(SCRIPT), reader, saved.path, str(out), *keys]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said: dict[str, Any] = json.loads(done.stdout)
    with np.load(out) as found:
        for key in keys:
            tensor = saved.tensors[key]
            assert said["arrays"][key][1] == list(tensor.shape), key
            assert found[key].tobytes() == host_elements(tensor.detach()).tobytes(), key
    return said


def test_zarr_python_opens_core_types_from_the_consolidated_root_alone(core: Saved, tmp_path: Path) -> None:
    said = read_by("zarr_group", core, tmp_path / "out.npz")
    assert said["consolidated"]
    assert len(list(Path(core.path).glob("extra/dtypes/complex128/c.*"))) == 10  # columns and edges with pads
    assert {said["arrays"][f"extra/dtypes/{name}"][0] for name in CORE} == set(CORE)


@pytest.mark.parametrize("reader", ["zarr_paths", "zarrs", "xarray", "tensorstore"])
def test_core_types_are_read_bit_for_bit(core: Saved, tmp_path: Path, reader: str) -> None:
    read_by(reader, core, tmp_path / "out.npz")


@pytest.mark.parametrize("reader", ["zarr_paths", "xarray_group"])
def test_types_that_a_reader_lacks_do_not_hide_the_others(extended: Saved, tmp_path: Path, reader: str) -> None:
    """One bfloat16 array beside them: arrays of core types in other groups still open, by path and by group."""
    readable = [key for key in extended.tensors if not key.startswith("extra/dtypes")]
    readable += [f"extra/dtypes/{name}" for name in CORE] if reader == "zarr_paths" else []
    read_by(reader, extended, tmp_path / "out.npz", readable)


def test_tensorstore_reads_every_type(extended: Saved, tmp_path: Path) -> None:
    said = read_by("tensorstore", extended, tmp_path / "out.npz")
    assert {said["arrays"][f"extra/dtypes/{name}"][0] for name in EXTENSION} == set(EXTENSION)


def test_dimension_names_are_one_per_size_and_axis(core: Saved, tmp_path: Path) -> None:
    sizes = read_by("xarray", core, tmp_path / "out.npz")["sizes"]
    assert sizes["params/model/square.weight/value"] == {"n6": 6, "n6_2": 6}
    assert sizes["params/model/cube/exp_avg"] == {"n4": 4, "n4_2": 4, "n4_3": 4}


WITH_TYPES = """
import sys, warnings
import numpy as np, zarr, xarray
from elastickpt.storage.arrays import register_data_types
register_data_types()
tree, out = sys.argv[1:]
group = zarr.open_group(tree, mode="r")
opened = xarray.open_datatree(tree, engine="zarr", consolidated=False, mask_and_scale=False)
found = {}
for name, array in group["extra/dtypes"].arrays():
    assert opened["extra/dtypes"][name].dtype == array.dtype, name
    assert opened["extra/dtypes"][name].values.tobytes() == array[...].tobytes(), name
    found[name] = np.frombuffer(array[...].tobytes(), dtype=np.uint8)
assert "torch" not in sys.modules
np.savez(out, **found)
"""


def test_zarr_python_and_xarray_read_every_type_with_our_data_types_and_without_torch(extended: Saved, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    command = [sys.executable, "-W", "ignore", "-c", WITH_TYPES, extended.path, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(out) as found:
        assert set(found) == set(CORE + EXTENSION)
        for name in found:
            assert found[name].tobytes() == host_elements(extended.tensors[f"extra/dtypes/{name}"]).tobytes(), name


def test_a_lost_chunk_reads_as_the_loud_fill_value(core: Saved, tmp_path: Path) -> None:
    """Plain readers cannot know; they see NaN, extremes and true, never zeros."""
    import shutil

    import zarr

    shutil.copytree(core.path, tmp_path / "copy")
    for chunk in (tmp_path / "copy" / "extra" / "dtypes").glob("*/c.*"):
        chunk.unlink()
    group = zarr.open_group(tmp_path / "copy", mode="r")
    assert np.isnan(group["extra/dtypes/float32"][...]).all()
    assert (group["extra/dtypes/int16"][...] == -(2**15)).all()
    assert (group["extra/dtypes/uint8"][...] == 255).all()
    assert group["extra/dtypes/bool"][...].all()


def test_our_own_group_shows_the_same_arrays_as_the_tree(extended: Saved) -> None:
    opened = ek.open(extended.path)
    for key, tensor in extended.tensors.items():
        assert opened.arrays[key][...].tobytes() == host_elements(tensor.detach()).tobytes(), key
    assert opened.verify().sound
