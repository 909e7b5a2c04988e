"""Trees of these documents open in zarr-python, tensorstore, zarrs and xarray, and read what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr

from elastickpt.format.arrays import DTYPES, ArrayId, ArraySpec
from elastickpt.format.documents import documents, root_document
from elastickpt.format.keys import array_keys, chunk_file
from elastickpt.format.records import ArrayRecord, IndexPart

Arrays = dict[str, np.ndarray[Any, Any]]
CORE = [name for name, dtype in DTYPES.items() if dtype.support == "core"]
EXTENSIONS = [name for name, dtype in DTYPES.items() if dtype.support == "extension"]


def _records(ids: list[ArrayId], shapes: list[tuple[int, ...]], dtypes: list[str]) -> tuple[ArrayRecord, ...]:
    keys = array_keys(ids)
    found = [
        ArrayRecord(ArraySpec(one, shape, dtype), keys[one], tuple(max(1, n) for n in shape), None, (0,))
        for one, shape, dtype in zip(ids, shapes, dtypes, strict=True)
    ]
    return tuple(sorted(found, key=lambda record: record.key))


def _bits(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    count = int(np.prod(shape)) * kind.itemsize
    raw = np.arange(count, dtype=np.uint8) % (2 if dtype == "bool" else 200)
    return raw.view(kind).reshape(shape)


def _write(root: Path, records: tuple[ArrayRecord, ...]) -> Arrays:
    for name, data in documents([IndexPart(records)]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    arrays = {record.key: _bits(record.spec.dtype, record.spec.shape) for record in records}
    for record in records:
        if arrays[record.key].size:
            (root / chunk_file(record.key, (0,) * len(record.spec.shape))).write_bytes(arrays[record.key].tobytes())
    return arrays


@pytest.fixture
def core_tree(tmp_path: Path) -> tuple[Path, Arrays]:
    """All core element types, names of all sorts, no axes, no elements, repeated sizes."""
    ids = [ArrayId("params", "model", f"layers.{k}", "value") for k in range(len(CORE))]
    shapes: list[tuple[int, ...]] = [(4, 6)] * len(CORE)
    names = ["W", "w", "a/b c", "é", "", "..", "__x", "zarr.json", "x" * 300, "scalar", "zero", "square"]
    ids += [ArrayId("params", "model", name, "value") for name in names] + [ArrayId("extra", "loader", "perm/0~1x", "")]
    shapes += [(2,)] * 9 + [(), (0, 6), (3, 4, 3, 3), (5,)]
    return tmp_path, _write(tmp_path, _records(ids, shapes, CORE + ["float32"] * 13))


def _same(found: Any, wanted: np.ndarray[Any, Any]) -> bool:
    return np.asarray(found).tobytes() == wanted.tobytes() and np.asarray(found).shape == wanted.shape


def test_zarr_python_reads_all_core_types(core_tree: tuple[Path, Arrays]) -> None:
    root, arrays = core_tree
    group = zarr.open_group(str(root), mode="r", zarr_format=3)
    assert group.metadata.consolidated_metadata is not None
    for key, wanted in arrays.items():
        assert _same(group[key][...], wanted), key


def test_zarr_python_walks_the_groups_without_consolidated_metadata(core_tree: tuple[Path, Arrays]) -> None:
    root, arrays = core_tree
    group = zarr.open_group(str(root), mode="r", zarr_format=3, use_consolidated=False)
    found = {key for key, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert found == set(arrays)
    name = "a/b c"
    node = group["params/model/a%2Fb%20c"]
    assert node.attrs["elastickpt"] == {"section": "params", "item": "model", "name": name}


def test_zarrs_reads_all_core_types(core_tree: tuple[Path, Arrays]) -> None:
    pytest.importorskip("zarrs")
    root, arrays = core_tree
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        group = zarr.open_group(str(root), mode="r", zarr_format=3)
        for key, wanted in arrays.items():
            assert _same(group[key][...], wanted), key


def _open_with_tensorstore(path: Path) -> Any:
    tensorstore = pytest.importorskip("tensorstore")
    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(store).result().read().result()


def test_tensorstore_reads_all_core_types(core_tree: tuple[Path, Arrays]) -> None:
    root, arrays = core_tree
    for key, wanted in arrays.items():
        assert _same(_open_with_tensorstore(root / key), wanted), key


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_tensorstore_reads_extension_types(tmp_path: Path, dtype: str) -> None:
    arrays = _write(tmp_path, _records([ArrayId("extra", "x", "", "")], [(3, 4)], [dtype]))
    assert _same(_open_with_tensorstore(tmp_path / "extra/x"), arrays["extra/x"])


@pytest.mark.parametrize("dtype", EXTENSIONS)
def test_an_extension_type_leaves_the_root_unconsolidated(dtype: str) -> None:
    """[UCF-17]: one unknown type in it makes zarr-python refuse the whole group."""
    ids = [ArrayId("extra", "a", "", ""), ArrayId("extra", "b", "", "")]
    root = json.loads(root_document(_records(ids, [(2,), (2,)], ["float32", dtype])))
    assert list(root) == ["zarr_format", "node_type", "attributes"]


def test_other_arrays_of_a_group_with_an_extension_type_open(tmp_path: Path) -> None:
    ids = [ArrayId("extra", "a", "", ""), ArrayId("extra", "b", "", "")]
    arrays = _write(tmp_path, _records(ids, [(2,), (2,)], ["float32", "bfloat16"]))
    group = zarr.open_group(str(tmp_path), mode="r", zarr_format=3)
    assert _same(group["extra/a"][...], arrays["extra/a"])


def test_xarray_opens_every_group_and_the_tree(core_tree: tuple[Path, Arrays]) -> None:
    xarray = pytest.importorskip("xarray")
    root, arrays = core_tree
    for key, wanted in arrays.items():
        group, _, name = key.rpartition("/")
        with xarray.open_zarr(str(root), group=group, chunks=None, mask_and_scale=False, consolidated=False) as dataset:
            assert _same(dataset[name].values, wanted), key
    with xarray.open_datatree(str(root), engine="zarr", chunks=None, mask_and_scale=False) as tree:
        assert tree["params/model/square/value"].dims == ("n3", "n4", "n3_2", "n3_3")


@pytest.mark.parametrize(("count", "consolidated"), [(0, False), (1, True), (20_000, True), (20_001, False)])
def test_the_root_is_consolidated_up_to_20000_arrays(count: int, consolidated: bool) -> None:
    """[UCF-17]"""
    spec = ArraySpec(ArrayId("extra", "x", "", ""), (2,), "float32")
    records = tuple(ArrayRecord(spec, f"extra/{k:05d}", (2,), None, (0,)) for k in range(count))
    assert (b"consolidated_metadata" in root_document(records)[:200]) == consolidated


def test_documents_are_a_function_of_all_parts_together() -> None:
    """[UCF-10]: how the index is split changes no byte."""
    ids = [ArrayId("params", "m", name, state) for name in ("a", "b", "c") for state in ("value", "exp_avg")]
    records = _records(ids, [(2,)] * 6, ["float32"] * 6)
    whole = dict(documents([IndexPart(records)]))
    for cut in range(7):
        assert dict(documents([IndexPart(records[:cut]), IndexPart(records[cut:])])) == whole
