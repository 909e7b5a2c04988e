"""What lies in a row is read in few runs, each byte once, whatever pieces and arrays it is of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import elastickpt as ek
from elastickpt.errors import ChecksumMismatch, WrongLength
from elastickpt.format.arrays import Box
from elastickpt.format.memory_views import address_of
from elastickpt.format.piece_columns import FragmentColumns, columns_of
from elastickpt.format.records import StoredFile, StoredPiece
from elastickpt.loading.fetch import FetchReport, fetch, pace_of
from elastickpt.loading.opened import open_records
from elastickpt.loading.stretches import GAP_NBYTES, Stretches, number_files, runs_of
from elastickpt.loading.targets import Wanted
from elastickpt.storage import kernel, ranges
from elastickpt.storage.kernel import HUGE_PAGE, huge_buffer

BLOCK, UNIT = 65_536, 262_144


@st.composite
def maps_and_stretches(draw: st.DrawFn) -> tuple[tuple[FragmentColumns, ...], Stretches]:
    """Maps whose pieces lie in the same few files, and stretches of whole blocks of some of them."""
    maps, rows = [], []
    files = tuple(StoredFile(0, f"packs/{name}.bin", 1 << 40) for name in "ba")
    end = [0, 0]
    for number in range(draw(st.integers(1, 3))):
        pieces = []
        for piece in range(draw(st.integers(1, 6))):
            file = draw(st.integers(0, 1))
            nbytes = draw(st.one_of(st.integers(1, 3000), st.integers(1, 5 * BLOCK)))
            offset = end[file] + draw(st.sampled_from([0, 0, 64, GAP_NBYTES, GAP_NBYTES + 1, 100_000]))
            end[file] = offset + nbytes
            sums = tuple(draw(st.integers(0, 2**64 - 1)) for _ in range(-(-nbytes // BLOCK)))
            pieces.append(StoredPiece(f"k{piece}", Box((0,), (nbytes,)), file, offset, nbytes, nbytes, nbytes, sums))
            first = draw(st.integers(0, len(sums) - 1))
            low = draw(st.integers(first * BLOCK, min((first + 1) * BLOCK, nbytes) - 1))
            high = draw(st.integers(max((len(sums) - 1) * BLOCK, low) + 1, nbytes))
            rows.append((number, piece, first * BLOCK, nbytes, low, high, len(rows), 1000))
        maps.append(FragmentColumns(number, "a", BLOCK, files, columns_of(pieces)))
    return tuple(maps), Stretches.of(draw(st.permutations(rows)))


@given(maps_and_stretches())
def test_runs_hold_every_byte_of_the_stretches_once_in_the_order_of_files(
    made: tuple[tuple[FragmentColumns, ...], Stretches],
) -> None:
    maps, stretches = made
    files, file = number_files(maps, stretches)
    assert [one.path for one in files] == sorted({maps[0].files[0].path, maps[0].files[1].path} & {one.path for one in files})
    runs = runs_of(maps, stretches, file, unit_nbytes=UNIT)
    held: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    places = []
    for run in range(len(runs)):
        end = int(runs.offset[run])
        for k in range(int(runs.first[run]), int(runs.first[run + 1])):
            cut, columns = runs.stretches, maps[int(runs.stretches.map[k])]
            piece = columns.pieces.piece_of(int(cut.piece[k]), columns.pieces.box(int(cut.piece[k])))
            start, stop = int(cut.start[k]), int(cut.end[k])
            assert files[int(runs.file[run])] == columns.files[piece.file]
            assert runs.offsets[k] == piece.offset + start >= end
            assert runs.offsets[k] - end <= GAP_NBYTES
            end = int(runs.offsets[k]) + stop - start
            sums = runs.checksums[runs.checksum_start[k] : runs.checksum_start[k + 1]].tolist()
            assert sums == list(piece.checksums[start // BLOCK : -(-stop // BLOCK)])
            wanted = (int(cut.low[k]), int(cut.high[k]), int(cut.at[k]))
            held.setdefault((int(cut.map[k]), int(cut.piece[k])), []).append((start, stop, *wanted))
        assert end - runs.offset[run] == runs.nbytes[run] <= UNIT
        places.append((int(runs.file[run]), int(runs.offset[run])))
    assert places == sorted(places)
    for number, piece_number, start, end, low, high, _, at, *_ in zip(*(c.tolist() for c in stretches.columns), strict=True):
        parts = sorted(held.pop((number, piece_number)))
        assert [parts[0][0], *(part[1] for part in parts)] == [*(part[0] for part in parts), end]
        assert parts[0][0] == start
        assert [parts[0][2], *(part[3] for part in parts)] == [*(part[2] for part in parts), high]
        assert parts[0][2] == low
        assert all(first <= begin < stop <= last for first, last, begin, stop, _ in parts)
        assert [part[4] - part[2] for part in parts] == [at - low] * len(parts)
    assert not held


def test_no_stretch_makes_no_run() -> None:
    files, file = number_files((), Stretches.of(()))
    assert (files, len(runs_of((), Stretches.of(()), file, unit_nbytes=UNIT))) == ((), 0)


# -- reading -----------------------------------------------------------------------------------------------------------

SMALL, LARGE = 200, 700_000


@pytest.fixture(params=["plain", "packed"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors = {f"t{k:03}": torch.arange(256) + k for k in range(SMALL)}
    ek.save({"many": tensors, "large": torch.arange(LARGE)}, tmp_path / "c", placement=request.param)
    return tmp_path / "c"


def read(path: Path) -> tuple[dict[str, np.ndarray], FetchReport]:
    opened = open_records(path)
    records = opened.records.values()
    made = {one.spec.id.name: np.zeros(one.spec.shape, dtype=np.uint64) for one in records}
    wanted = [Wanted(one, Box.whole(one.spec.shape), made[one.spec.id.name], cache="spare") for one in records]
    return made, fetch(opened, wanted)


def test_small_arrays_of_one_pack_are_read_at_once(path: Path) -> None:
    made, report = read(path)
    assert sorted(int(words[0]) for words in made.values() if len(words) == 256) == list(range(SMALL))
    assert all((np.diff(words) == 1).all() for words in made.values())
    assert report.wanted_nbytes == SMALL * 2048 + LARGE * 8
    opened = open_records(path)
    unit = pace_of(opened.store).unit_nbytes
    fewest = -(-report.wanted_nbytes // unit)
    if opened.manifest.placement == "packed":
        assert report.reads <= fewest + 3
    else:
        assert report.reads >= SMALL


def damaged(path: Path, name: str, at: int) -> tuple[int, int]:
    """Flips a bit of byte `at` of an array; the block that it is in, and where the array begins in its file."""
    columns = next(open_records(path).all_fragments())
    (key,) = [key for key in columns.pieces.arrays if name in key]
    (place,) = columns.pieces.by_array()[key]
    piece = columns.pieces.piece_of(place, columns.pieces.box(place))
    file = path / columns.files[piece.file].path
    data = bytearray(file.read_bytes())
    data[piece.offset + at] ^= 1
    file.write_bytes(data)
    return at // columns.block_nbytes, piece.offset


def test_a_damaged_array_in_a_run_is_named_and_no_other(path: Path) -> None:
    block, offset = damaged(path, "t077", 100)
    with pytest.raises(ChecksumMismatch, match=rf"block {block} of piece .* of array .*t077.*file offset {offset}\)"):
        read(path)


def test_a_file_cut_short_after_it_was_planned_is_named(path: Path) -> None:
    opened = open_records(path)
    file = path / next(opened.all_fragments()).files[0].path
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WrongLength, match=r"expected \d+ bytes \(in the fragment map\), found \d+; it holds array "):
        read(path)


# Short reads of a cold file


def halves(path: Path) -> tuple[dict[str, np.ndarray], FetchReport]:
    """Every first half of what is not small, of a file of which nothing is in the page cache."""
    with open(next((path / "packs").iterdir()), "rb") as pack:
        os.fsync(pack.fileno())
        os.posix_fadvise(pack.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if kernel.cached_pages(pack.fileno(), 0, 0) != 0 or not kernel.direct_alignment(pack.fileno()):
            pytest.skip("needs a kernel that lets go of its page cache, and O_DIRECT at the temporary folder")
    opened = open_records(path)
    records = [one for one in opened.records.values() if one.spec.shape[0] == HALVED]
    made = {one.spec.id.name: np.zeros(HALVED // 2, dtype=np.uint32) for one in records}
    wanted = [Wanted(one, Box((0,), (HALVED // 2,)), made[one.spec.id.name], cache="spare") for one in records]
    return made, fetch(opened, wanted)


HALVED = 50_000


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ranges were asked for at once, each time."""
    asked: list[int] = []
    real = ranges.read_several

    def counted(direct: Any, places: Any, memory: memoryview) -> list[memoryview] | None:
        asked.append(len(places))
        return real(direct, places, memory)

    monkeypatch.setattr(ranges, "read_several", counted)
    return asked


@pytest.fixture
def halved(tmp_path: Path) -> Path:
    tensors = {f"t{k:03}": torch.arange(HALVED, dtype=torch.int32) + k for k in range(40)}
    ek.save({"many": tensors}, tmp_path / "c", placement="packed")
    return tmp_path / "c"


def test_short_reads_of_one_cold_file_are_handed_to_the_kernel_together(halved: Path, several: list[int]) -> None:
    made, report = halves(halved)
    assert len(made) == 40
    assert all((np.diff(words) == 1).all() for words in made.values())
    assert sorted(int(words[0]) for words in made.values()) == list(range(40))
    assert sum(several) == report.reads == 40
    assert several == [9, 9, 9, 9, 4]  # of 100,000 bytes and the rest of a block of 16 KiB: up to 1 MiB


def test_of_several_short_reads_the_damaged_one_is_named(halved: Path, several: list[int]) -> None:
    block, _ = damaged(halved, "t017", 70_000)
    with pytest.raises(ChecksumMismatch, match=rf"block {block} of piece .* of array .*t017"):
        halves(halved)
    assert several


@pytest.mark.parametrize("nbytes", [1, 4096, HUGE_PAGE, HUGE_PAGE + 1])
def test_memory_on_huge_pages_begins_at_one_and_is_zero(nbytes: int) -> None:
    memory = huge_buffer(nbytes)
    assert (memory.size, address_of(memory.data) % HUGE_PAGE, memory.any()) == (nbytes, 0, False)
    memory[-1] = 1


class _Memory:
    in_memory = True


@pytest.mark.parametrize(("cores", "processes", "threads"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 8, 1), (64, 8, 2)])
def test_copies_are_made_by_no_more_threads_than_there_are_cores_for(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert pace_of(_Memory(), processes=processes).threads == threads  # type: ignore[arg-type]


@pytest.mark.parametrize(("processes", "threads"), [(1, 8), (2, 4), (64, 4)])
def test_of_a_disk_fewer_reads_are_under_way_of_each_process_where_several_read(processes: int, threads: int) -> None:
    assert pace_of(object(), processes=processes).threads == threads  # type: ignore[arg-type]
