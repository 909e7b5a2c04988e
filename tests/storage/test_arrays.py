"""What zarr-python makes of our documents and chunks: every bit as stored, and no silent fill."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from elastickpt.errors import MissingFile, ReadOnly, Unsupported
from elastickpt.format.arrays import DTYPES
from elastickpt.storage import arrays
from elastickpt.storage.arrays import BFloat16, Float8E4M3FN, Float8E8M0FNU, read_only_store, register_data_types

EXTENSIONS = [dtype.name for dtype in DTYPES.values() if dtype.support == "extension"]
GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def array_document(shape, chunk_shape, data_type, *, fill_value="NaN", endian="little"):
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill_value,
        "codecs": [{"name": "bytes", "configuration": {"endian": endian}}],
        "attributes": {},
    }


class Tree:
    """Keys and bytes in a dictionary, served as `read_only_store` wants them."""

    def __init__(self, **files):
        self.files = {key: json.dumps(value).encode() if isinstance(value, dict) else value for key, value in files.items()}
        self.store = read_only_store(self.files.get, self.chunk, names=self.names)

    def chunk(self, key):
        if key not in self.files:
            raise MissingFile(f"{key} is not there")
        return self.files[key]

    def names(self, path):
        prefix = f"{path}/" if path else ""
        below = [key.removeprefix(prefix) for key in self.files if key.startswith(prefix)]
        return sorted({name.partition("/")[0] + "/" * ("/" in name) for name in below})

    def get(self, key, byte_range=None):
        found = sync(self.store.get(key, default_buffer_prototype(), byte_range))
        return None if found is None else found.to_bytes()


async def collected(keys):
    return [key async for key in keys]


@pytest.fixture
def tree():
    values = np.arange(60, dtype="<f4").reshape(10, 6)
    return Tree(
        **{
            "zarr.json": GROUP,
            "params/zarr.json": GROUP,
            "params/w/zarr.json": array_document((10, 6), (4, 6), "float32"),
            **{f"params/w/c.{chunk}.0": values[4 * chunk :][:4].tobytes().ljust(96, b"\0") for chunk in range(3)},
        }
    )


# Data types


@pytest.mark.parametrize("name", EXTENSIONS)
def test_every_bit_pattern_of_an_extension_type_is_read_as_stored(name):
    native = np.dtype(getattr(ml_dtypes, name))
    bits = np.arange(256**native.itemsize, dtype=f"<u{native.itemsize}").reshape(-1, 16)
    document = array_document(bits.shape, (bits.shape[0] // 2, 16), name)
    half = len(bits) // 2
    tree = Tree(
        **{
            "zarr.json": GROUP,
            "a/zarr.json": document,
            "a/c.0.0": bits[:half].tobytes(),
            "a/c.1.0": bits[half:].tobytes(),
        }
    )
    found = zarr.open_group(tree.store, mode="r")["a"]
    assert found.dtype == native
    assert found[:].tobytes() == bits.tobytes()
    assert found[3:9, 5].tobytes() == bits[3:9, 5].tobytes()


@pytest.mark.parametrize("name", EXTENSIONS)
def test_zarr_itself_writes_and_reads_the_extension_types(name, tmp_path):
    register_data_types()
    values = np.arange(1, 25).astype(getattr(ml_dtypes, name)).reshape(4, 6)
    written = zarr.create_array(tmp_path / "a", shape=(4, 6), chunks=(2, 6), dtype=values.dtype, compressors=None)
    written[:] = values
    found = zarr.open_array(tmp_path / "a", mode="r")
    assert json.loads((tmp_path / "a" / "zarr.json").read_text())["data_type"] == name
    assert found[:].tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("written", "bits"),
    [
        ("NaN", 0x7FC0),
        ("Infinity", 0x7F80),
        ("-Infinity", 0xFF80),
        ("0x7fc1", 0x7FC1),
        ("0xffc0", 0xFFC0),
        (0, 0),
        (-0.0, 0x8000),
        (1.5, 0x3FC0),
        (True, None),
        ("0x7f", None),
        ("seven", None),
        (None, None),
    ],
)
def test_fill_values_are_numbers_names_or_bits(written, bits):
    if bits is None:
        with pytest.raises((TypeError, ValueError)):
            BFloat16().from_json_scalar(written, zarr_format=3)
        return
    scalar = BFloat16().from_json_scalar(written, zarr_format=3)
    assert int.from_bytes(scalar.tobytes(), "little") == bits
    again = BFloat16().from_json_scalar(BFloat16().to_json_scalar(scalar, zarr_format=3), zarr_format=3)
    assert again.tobytes() == scalar.tobytes()


@pytest.mark.parametrize("name", EXTENSIONS)
def test_every_scalar_survives_its_json(name):
    cls = next(cls for cls in arrays._DATA_TYPES if cls._zarr_v3_name == name)
    bits = np.arange(256**cls.native.itemsize, dtype=f"<u{cls.native.itemsize}")
    for value in bits.view(cls.native):
        spelled = json.loads(json.dumps(cls().to_json_scalar(value, zarr_format=3)))
        assert cls().from_json_scalar(spelled, zarr_format=3).tobytes() == value.tobytes()


def test_a_value_that_the_type_lacks_is_refused():
    with pytest.raises(ValueError, match="Infinity"):
        Float8E4M3FN().from_json_scalar("Infinity", zarr_format=3)
    assert float(Float8E8M0FNU().default_scalar()) == 1.0


def test_the_entry_points_name_the_registered_classes():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    named = project["project"]["entry-points"]["zarr.data_type"]
    assert named == {cls._zarr_v3_name: f"{cls.__module__}:{cls.__name__}" for cls in arrays._DATA_TYPES}
    assert sorted(named) == sorted(EXTENSIONS)


def test_a_big_endian_bfloat16_is_refused_not_misread():
    document = array_document((2,), (2,), "bfloat16", endian="big")
    tree = Tree(**{"zarr.json": GROUP, "a/zarr.json": document, "a/c.0": b"\x3f\x80\x40\x00"})
    with pytest.raises(Unsupported, match="big"):
        zarr.open_group(tree.store, mode="r")["a"][:]


# The read-only store


def test_a_tree_without_files_opens_as_a_group(tree):
    group = zarr.open_group(tree.store, mode="r")
    assert np.array_equal(group["params/w"][:], np.arange(60, dtype="f4").reshape(10, 6))
    assert [name for name, _ in group.groups()] == ["params"]
    assert [name for name, _ in group["params"].arrays()] == ["w"]
    assert "(10, 6) float32" in str(group.tree())


def test_a_missing_chunk_is_an_error_and_no_fill(tree):
    del tree.files["params/w/c.1.0"]
    array = zarr.open_group(tree.store, mode="r")["params/w"]
    with pytest.raises(MissingFile, match=r"params/w/c\.1\.0"):
        array[:]
    assert array[:4].tolist() == np.arange(24, dtype="f4").reshape(4, 6).tolist()


def test_a_name_that_is_no_node_is_not_found(tree):
    with pytest.raises(KeyError):
        zarr.open_group(tree.store, mode="r")["params/absent"]


def test_errors_of_the_callables_reach_the_caller(tree):
    tree.files["params/w/c.0.0"] = tree.files["params/w/c.0.0"][:-1]
    with pytest.raises(ValueError, match="size"):
        zarr.open_group(tree.store, mode="r")["params/w"][:]


@pytest.mark.parametrize(
    ("byte_range", "expected"),
    [
        (None, b"0123456789"),
        (RangeByteRequest(2, 5), b"234"),
        (RangeByteRequest(8, 50), b"89"),
        (OffsetByteRequest(7), b"789"),
        (SuffixByteRequest(3), b"789"),
        (SuffixByteRequest(0), b""),
        (SuffixByteRequest(50), b"0123456789"),
    ],
)
def test_ranges_of_a_chunk_are_its_bytes(byte_range, expected):
    for data in (b"0123456789", bytearray(b"0123456789"), memoryview(b"0123456789")):
        assert Tree(**{"c.0": data}).get("c.0", byte_range) == expected


def test_keys_are_listed_whole_by_prefix_and_by_directory(tree):
    keys = ["params/w/c.0.0", "params/w/c.1.0", "params/w/c.2.0", "params/w/zarr.json", "params/zarr.json", "zarr.json"]
    assert sorted(sync(collected(tree.store.list()))) == keys
    assert sorted(sync(collected(tree.store.list_prefix("params/w/c")))) == keys[:3]
    assert sorted(sync(collected(tree.store.list_dir("params")))) == ["w", "zarr.json"]
    assert sorted(sync(collected(tree.store.list_dir("params/w/")))) == [key.rpartition("/")[2] for key in keys[:4]]
    assert [sync(tree.store.exists(key)) for key in (*keys, "params/w/c.9.0", "w/zarr.json")] == [True] * 6 + [False] * 2


def test_nothing_is_written_through_it(tree):
    group = zarr.open_group(tree.store, mode="r")
    with pytest.raises(ReadOnly):
        group["params/w"][:] = 0
    with pytest.raises(ReadOnly):
        sync(tree.store.delete("zarr.json"))
    with pytest.raises(ReadOnly):
        tree.store.with_read_only(False)
