"""Arrays of several chunks: edges with padding, columns, and sizes beyond what one file or 32 bits hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import elastickpt as ek
from elastickpt.errors import Refused
from elastickpt.format.arrays import ArrayId, Box
from elastickpt.layout import grid

SHAPES = ((), (1,), (17,), (100,), (9, 7), (3, 50), (1, 1, 90), (5, 6, 7), (2, 3, 4, 5), (40, 1))


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(grid, "CHUNK_NBYTES", 48)
    return


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.complex128])
def test_arrays_of_many_chunks_round_trip_and_their_pads_are_zero(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = {str(shape): torch.arange(max(int(np.prod(shape)), 1)).to(dtype).reshape(shape) for shape in SHAPES}
    ek.save({"a": saved}, tmp_path / "c")
    assert max(path.stat().st_size for path in (tmp_path / "c" / "extra").rglob("c*") if path.is_file()) <= 48
    live = {key: torch.zeros_like(tensor) for key, tensor in saved.items()}
    ek.load({"a": live}, tmp_path / "c")
    group = zarr.open_group(tmp_path / "c" / "extra" / "a", mode="r")
    opened = ek.open(tmp_path / "c")
    for key, tensor in saved.items():
        assert torch.equal(live[key], tensor), key
        record = opened.records[ArrayId("extra", "a", key, "")]
        assert np.array_equal(group[record.key.rpartition("/")[2]][...], tensor.numpy()), key
        assert np.array_equal(opened.arrays[record.key][...], tensor.numpy()), key
    assert opened.verify().sound


@pytest.mark.usefixtures("_small_chunks")
def test_a_box_across_chunks_is_read_alone(tmp_path: Path) -> None:
    whole = torch.arange(5 * 6 * 7.0).reshape(5, 6, 7)
    ek.save({"t": whole}, tmp_path / "c")
    opened, array = ek.open(tmp_path / "c"), ArrayId("extra", "t", "", "")
    for start, stop in (
        ((0, 0, 0), (5, 6, 7)),
        ((1, 2, 3), (4, 5, 6)),
        ((4, 5, 6), (5, 6, 7)),
        ((0, 3, 0), (5, 4, 7)),
        ((2, 2, 2), (2, 4, 4)),
    ):
        part = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
        assert np.array_equal(opened.read(array, box=Box(start, stop)), whole[part].numpy())


@pytest.mark.parametrize("box", [Box((0, 0), (5, 4)), Box((4, 4), (5, 5)), Box((0,), (4,)), Box((0, 0, 0), (1, 1, 1))])
def test_a_box_beyond_the_array_is_the_callers_mistake_and_no_damage(tmp_path: Path, box: Box) -> None:
    ek.save({"t": torch.ones(4, 4)}, tmp_path / "c")
    with pytest.raises(Refused, match=r"extra/t: expected a box inside its shape \(4, 4\)"):
        ek.open(tmp_path / "c").read(ArrayId("extra", "t", "", ""), box=box)


@pytest.mark.usefixtures("_small_chunks")
def test_a_nonzero_pad_is_found_by_verify_only(tmp_path: Path) -> None:
    ek.save({"t": torch.ones(5, 7).double()}, tmp_path / "c")
    chunks = sorted((tmp_path / "c" / "extra" / "t").glob("c.*"))
    data = bytearray(chunks[-1].read_bytes())
    data[-1] = 1
    chunks[-1].write_bytes(data)
    (problem,) = ek.open(tmp_path / "c").verify().problems
    assert "padding" in problem.message
    live = {"t": torch.zeros(5, 7).double()}
    ek.load(live, tmp_path / "c")
    assert torch.equal(live["t"], torch.ones(5, 7).double())


def _sparse(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros that take no disk and no memory before they are touched."""
    with path.open("wb") as file:
        file.truncate(int(np.prod(shape)))
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r+", shape=shape))


@pytest.mark.long
def test_an_array_beyond_two_gib_round_trips(tmp_path: Path) -> None:
    """2.25 GiB in nine chunks and a part of a tenth; marks lie around every boundary, the rest is zero."""
    rows, row = 2300, 1 << 20
    saved = _sparse(tmp_path / "saved", (rows, row))
    marks = [0, 255, 256, 511, 512, 1023, 1024, 2047, 2048, 2049, rows - 1]
    for number, mark in enumerate(marks):
        saved[mark, [0, row // 2, row - 1]] = torch.tensor([number + 1, 100 + number, 200 + number], dtype=torch.uint8)
    ek.save({"t": saved, "after": torch.arange(3)}, tmp_path / "c", durability="process")
    del saved
    (tmp_path / "saved").unlink()
    assert len(list((tmp_path / "c" / "extra" / "t").glob("c.*"))) == -(-rows // 256)
    live = _sparse(tmp_path / "live", (rows, row))
    after = torch.zeros(3, dtype=torch.int64)
    report = ek.load({"t": live, "after": after}, tmp_path / "c")
    assert report.nbytes == rows * row + 24
    for number, mark in enumerate(marks):
        assert live[mark, [0, row // 2, row - 1]].tolist() == [number + 1, 100 + number, 200 + number]
    assert int(torch.count_nonzero(live.sum(dim=1, dtype=torch.int64))) == len(marks)
    assert after.tolist() == [0, 1, 2]
    opened = ek.open(tmp_path / "c")
    part = opened.read(ArrayId("extra", "t", "", ""), box=Box((2047, row - 1), (2050, row)))
    assert part.reshape(-1).tolist() == [207, 208, 209]
