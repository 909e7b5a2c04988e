"""Files of torch.save as torch itself writes them, of every kind of tensor; and what is no such file. [FOR-20..26]"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from dense import bits, whole_of
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import (
    ChecksumMismatch,
    LimitExceeded,
    Malformed,
    NotACheckpoint,
    Refused,
    StructureConflict,
    Unsupported,
    ValueNotCarried,
)
from elastickpt.foreign.folder import open_folder
from elastickpt.foreign.formats import find_source, read_foreign
from elastickpt.foreign.listing import ForeignCheckpoint, Storage, StoredTensor, TiedName
from elastickpt.foreign.tensor_bytes import ranges, read_box, read_tensor_into
from elastickpt.format.arrays import DTYPES, Box
from elastickpt.storage.store import RangeReader


def read(path: Path) -> ForeignCheckpoint:
    return read_foreign(find_source(open_folder(path)))


def saved(tmp_path: Path, value: object) -> ForeignCheckpoint:
    torch.save(value, tmp_path / "a.pt")
    return read(tmp_path / "a.pt")


def of_torch(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    flat = tensor.detach().contiguous().reshape(-1)
    return tuple(tensor.shape), bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_element_type_and_shape_has_its_bits(tmp_path, name) -> None:
    dtype = getattr(torch, name)
    model = {str(shape): some(dtype, *shape) for shape in [(), (0,), (2, 0, 3), (5,), (2, 3, 4)]}
    found = saved(tmp_path, {"model": {**model, "f": torch.ones(1)}})
    made = {one.name: bits(whole_of(found, one)) for one in found.wholes if one.name in model}
    assert made == {key: of_torch(tensor) for key, tensor in model.items()}


STRIDED = {
    "transposed": lambda t: t.t(),
    "permuted": lambda t: t.reshape(2, 5, 6).permute(2, 0, 1),
    "every second row": lambda t: t[::2],
    "every third column": lambda t: t[:, 1::3],
    "part": lambda t: t[3:7, 2:5],
    "part, transposed": lambda t: t[3:7, 2:5].t(),
    "channels last": lambda t: t.reshape(1, 2, 5, 6).contiguous(memory_format=torch.channels_last),
    "one element": lambda t: t[4, 3],
    "repeated": lambda t: t[0].expand(4, 6),
    "overlapping": lambda t: t.as_strided((5, 5), (3, 2)),
    "far apart": lambda t: t.as_strided((2, 2), (50, 9)),
    "wide view": lambda t: torch.arange(100_000.0)[:99_999].reshape(3, 33_333)[:, ::1000],
}


@pytest.mark.parametrize("kind", STRIDED)
def test_views_of_any_strides_have_their_elements(tmp_path, kind) -> None:
    tensor = STRIDED[kind](torch.arange(60.0).reshape(10, 6))
    found = saved(tmp_path, {"model": {"a": tensor}})
    (one,) = found.wholes
    assert bits(whole_of(found, one)) == of_torch(tensor)


def test_shared_storage_is_a_tie_only_where_all_is_the_same(tmp_path) -> None:
    """[FOR-33]"""
    whole = torch.arange(6.0).reshape(2, 3)
    found = saved(tmp_path, {"model": {"a": whole, "b": whole, "half": whole[:1], "flat": whole.reshape(6)}})
    assert found.tied == (TiedName("model", "b", "a"),)
    assert {one.name for one in found.wholes} == {"a", "half", "flat"}
    assert len({one.pieces[0].stored.storage for one in found.wholes}) == 1


def test_parameters_and_tensors_with_attributes_are_tensors(tmp_path) -> None:
    marked = torch.nn.Parameter(torch.ones(2))
    marked.partition = 3
    plain = torch.ones(3)
    plain.note = "x"
    found = saved(tmp_path, {"model": {"a": marked, "b": torch.nn.Parameter(torch.ones(1), requires_grad=False), "c": plain}})
    assert [one.shape for one in found.wholes] == [(2,), (1,), (3,)]


def test_a_state_dict_alone_is_the_model_and_an_optimizer_alone_the_optimizer(tmp_path) -> None:
    """[FOR-30, FOR-31]"""
    layer = torch.nn.Linear(2, 3)
    assert {(one.item, one.name) for one in saved(tmp_path, layer.state_dict()).wholes} == {
        ("model", "weight"),
        ("model", "bias"),
    }
    optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    found = saved(tmp_path, optimizer.state_dict())
    assert {(one.item, one.name, one.state) for one in found.wholes} == {("optimizer", k, "momentum_buffer") for k in (0, 1)}


def test_nested_items_and_several_optimizers_keep_their_places(tmp_path) -> None:
    """[FOR-32, FOR-35]"""
    one = {"state": {0: {"step": 3, "exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    found = saved(
        tmp_path,
        {
            "app": {"net": {"w": torch.ones(2)}, "opt": one, "epoch": 4},
            "optimizer_states": [one, {"state": {}, "param_groups": []}],
            "mask": torch.ones(3, dtype=torch.bool),
            "noise": [torch.zeros(4, dtype=torch.uint8)],
            "big": {"table": torch.zeros(100_000, dtype=torch.uint8), "n": 1},
        },
    )
    assert {(one.item, one.name, one.state) for one in found.wholes} == {
        ("app.net", "w", "value"),
        ("app.opt", 0, "exp_avg"),
        ("optimizer_states.0", 0, "exp_avg"),
        ("mask", "", ""),
        ("big", "table", ""),
    }
    assert {(one.item, one.state, one.value) for one in found.scalars} == {
        ("app.opt", "step", 3),
        ("optimizer_states.0", "step", 3),
    }
    assert found.values["/app/epoch"] == 4
    assert found.values["/noise"][0].shape == (4,)
    assert found.values["/big"]["n"] == 1


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (lambda: torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
        (lambda: torch.eye(3, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
    ],
)
def test_tensors_that_are_no_arrays_are_named(tmp_path, tensor, says) -> None:
    """Among weights they are refused, elsewhere reported: none is left out without a word."""
    found = saved(tmp_path, {"model": {"a": torch.ones(1)}, "odd": {"t": tensor()}})
    assert [(one.name, says in one.reason) for one in found.not_carried] == [("odd", True)]
    with pytest.raises((ValueNotCarried, Unsupported), match="odd"):
        saved(tmp_path, {"model": {"a": torch.ones(1), "odd": tensor()}})


@pytest.mark.parametrize("mark", ["conj", "neg"])
def test_bytes_that_are_still_to_be_changed_are_refused(tmp_path, mark) -> None:
    tensor = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(Unsupported, match=f"resolve_{mark}"):
        saved(tmp_path, {"model": {"a": tensor.conj() if mark == "conj" else torch._neg_view(tensor)}})


def test_a_file_from_before_zip_archives_is_refused_by_name(tmp_path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(Unsupported, match=r"torch 1\.6"):
        read(tmp_path / "a.pt")


def test_a_program_is_refused_by_name(tmp_path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "a.pt")
    with pytest.raises(Unsupported, match="TorchScript"):
        read(tmp_path / "a.pt")


def test_a_model_pickled_whole_is_refused_with_its_class(tmp_path) -> None:
    with pytest.raises(Exception, match=r"torch\.nn\.modules\.linear\.Linear"):
        saved(tmp_path, torch.nn.Linear(1, 1))


def test_a_packed_archive_is_refused_by_name(tmp_path) -> None:
    torch.save({"a": torch.ones(99)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as one, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as other:
        for name in one.namelist():
            other.writestr(name, one.read(name))
    with pytest.raises(Unsupported, match="packed"):
        read(tmp_path / "b.pt")


def rewritten(tmp_path: Path, changes: dict[str, bytes | None]) -> Path:
    """The file with other records, under a sound directory."""
    torch.save({"model": {"a": torch.arange(10.0)}}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as one, zipfile.ZipFile(tmp_path / "b.pt", "w") as other:
        for name in one.namelist():
            data = changes.get(name, one.read(name))
            if data is not None:
                other.writestr(name, data)
    return tmp_path / "b.pt"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"a/data/0": b"1234"}, Malformed, "said to have 40 bytes, its record has 4"),
        ({"a/data/0": None}, Malformed, "no record holds it"),
        ({"a/data.pkl": None}, Malformed, r"data\.pkl"),
        ({"a/byteorder": b"big"}, Unsupported, "byte order"),
        ({"a/data.pkl": b"\x80\x02K\x01."}, Malformed, "expected a mapping"),
    ],
)
def test_records_that_do_not_fit_are_refused(tmp_path, changes, error, says) -> None:
    with pytest.raises(error, match=says):
        read(rewritten(tmp_path, changes))


def test_a_changed_byte_of_the_pickle_is_found_by_its_checksum(tmp_path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "word": "unchanged"}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data.replace(b"unchanged", b"UNCHANGED"))
    with pytest.raises(ChecksumMismatch):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("left", [0, 1, 3, 30, 100, -1, -22, -100])
def test_a_file_cut_short_is_malformed(tmp_path, left) -> None:
    torch.save({"model": {"a": torch.arange(10.0)}}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[:left])
    with pytest.raises((Malformed, NotACheckpoint)):
        read(tmp_path / "a.pt")


RECORD = Storage("a.pt", 100, 40)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "error"),
    [
        (0, (11,), (1,), Malformed),
        (1, (10,), (1,), Malformed),
        (0, (4, 4), (3, 1), Malformed),
        (-1, (1,), (1,), Malformed),
        (9, (2,), (-1,), Malformed),
        (0, (-1,), (1,), Malformed),
        (0, (2,), (1, 1), Malformed),
        (11, (), (), Malformed),
        (0, (1 << 40,), (0,), LimitExceeded),
        (0, (1 << 49, 0), (0, 0), LimitExceeded),
        (0, (1,) * 33, (0,) * 33, LimitExceeded),
    ],
)
def test_no_tensor_leaves_its_record(offset, shape, strides, error) -> None:
    """[FOR-2, FOR-4]"""
    StoredTensor(RECORD, 0, (10,), (1,), "float32")
    with pytest.raises(error):
        StoredTensor(RECORD, offset, shape, strides, "float32")


def test_several_files_in_a_folder_are_refused_unless_an_index_names_them(tmp_path) -> None:
    """[FOR-70]"""
    torch.save({"a": torch.ones(1)}, tmp_path / "one.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "two.bin")
    with pytest.raises(Refused, match=r"one\.bin, two\.bin"):
        read(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "one.bin", "b": "two.bin"}}')
    assert [one.name for one in read(tmp_path).wholes] == ["a", "b"]
    shutil.copy(tmp_path / "one.bin", tmp_path / "two.bin")
    with pytest.raises(StructureConflict, match="another file too"):
        read(tmp_path)


class Counting:
    """A file that says how much of it was read."""

    def __init__(self, reader: RangeReader) -> None:
        self.reader = reader
        self.read: list[int] = []

    def read_into(self, offset: int, into: memoryview) -> None:
        self.read.append(len(into))
        self.reader.read_into(offset, into)


@pytest.mark.parametrize(
    ("box", "read"),
    [
        (Box((0, 0), (3, 1000)), [12_000]),
        (Box((1, 0), (2, 1000)), [4_000]),
        (Box((0, 5), (3, 7)), [8, 8, 8]),
        (Box((0, 5), (3, 990)), [4 * 2985]),
        (Box((1, 1), (1, 5)), []),
    ],
)
def test_reading_a_part_reads_the_parts_bytes_and_little_between(tmp_path, box, read) -> None:
    """[FOR-6]"""
    tensor = torch.arange(3_000.0).reshape(3, 1_000)
    found = saved(tmp_path, {"model": {"a": tensor}})
    with open_folder(found.folder).opened("a.pt") as archive:
        counting = Counting(archive.reader)
        made = read_box(counting, found.wholes[0].pieces[0].stored, box)
    part = tensor[box.start[0] : box.stop[0], box.start[1] : box.stop[1]]
    assert (counting.read, bytes(made)) == (read, of_torch(part)[1])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    gaps=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    run=st.sampled_from([1, 3, 2000]),
)
def test_what_is_read_is_what_is_said_to_be_read(shape: list[int], gaps: list[int], order: list[int], run: int) -> None:
    """Tensors of any strides: the elements, and the ranges that a plan counts on."""
    extents, strides, step = (*shape, run), [0] * len(shape) + [1], run
    for k in [one for one in order if one < len(shape)]:
        step += gaps[k]
        strides[k] = step
        step *= shape[k]
    data = np.arange(step + run, dtype=np.float32)
    tensor = StoredTensor(Storage("a", 0, data.nbytes), 0, extents, tuple(strides), "float32")
    counting = Noting(data.tobytes())
    made = np.empty(tensor.nbytes, np.uint8)
    read_tensor_into(counting, tensor, made)
    wanted = np.lib.stride_tricks.as_strided(data, extents, [4 * one for one in strides])
    assert made.tobytes() == np.ascontiguousarray(wanted).tobytes()
    assert counting.ranges == list(ranges(tensor))


class Noting:
    """Bytes in memory, and which of them were read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.nbytes = data, len(data)
        self.ranges: list[tuple[int, int]] = []

    def read_into(self, offset: int, into: memoryview) -> None:
        self.ranges.append((offset, offset + into.nbytes))
        into.cast("B")[:] = self.data[offset : offset + into.nbytes]

    def close(self) -> None:
        """Nothing is open."""
