"""An array of several writers: which maps a load reads, those of writers that by the layout held any of it [FRAG-35]; and what
it reads at once, pieces in a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import elastickpt as ek
from elastickpt.errors import ChecksumMismatch, CoverageGap, WrongLength
from elastickpt.format.arrays import Box
from elastickpt.format.records import ArrayRecord
from elastickpt.loading.fetch import FetchReport, fetch
from elastickpt.loading.opened import Opened, open_records
from elastickpt.loading.plan import require_stored
from elastickpt.loading.targets import Wanted
from tools.gloo_ranks import run_ranks

pytestmark = pytest.mark.ranks

ROWS, WORLD = 10, 4  # 3, 3, 3 and 1 of them


def save(rank: int, world_size: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    ek.save({"t": {"w": distribute_tensor(torch.arange(ROWS * 2.0).reshape(ROWS, 2), mesh, [Shard(0)])}}, path)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("holders") / "c"
    run_ranks(save, WORLD, str(found))
    return found


def record_of(opened: Opened) -> ArrayRecord:
    (record,) = opened.records.values()
    return record


def read(opened: Opened, rows: tuple[int, int]) -> tuple[set[int], list[tuple[int, int]]]:
    """The writers whose maps were read for these rows, and the rows of the pieces found."""
    found = require_stored(opened, record_of(opened), Box((rows[0], 0), (rows[1], 2)))
    return set(opened._fragments.maps), [(piece.box.start[0], piece.box.stop[0]) for _, _, piece in found]


@pytest.mark.parametrize(
    ("rows", "writers"), [((3, 6), {1}), ((4, 5), {1}), ((5, 7), {1, 2}), ((8, 10), {2, 3}), ((0, 10), {0, 1, 2, 3})]
)
def test_the_maps_of_those_who_held_any_of_it_are_read(path: Path, rows: tuple[int, int], writers: set[int]) -> None:
    maps, pieces = read(open_records(path), rows)
    assert maps == writers
    assert pieces == [(3 * writer, min(3 * writer + 3, ROWS)) for writer in sorted(writers)]


@pytest.mark.parametrize("ranks", [(3, 2, 1, 0), (10, 11, 12, 13)])
def test_all_maps_are_read_where_the_layout_names_others(path: Path, ranks: tuple[int, ...]) -> None:
    """A group of some ranks counts its writers anew."""
    opened = open_records(path)
    (mesh,) = opened.manifest.meshes
    opened.manifest = replace(opened.manifest, meshes=(replace(mesh, ranks=ranks),))
    maps, pieces = read(opened, (3, 6))
    assert (maps, pieces) == ({0, 1, 2, 3}, [(3, 6)])


def test_what_nobody_stored_is_a_gap_after_all_maps_were_read(path: Path) -> None:
    opened = open_records(path)
    record = record_of(opened)
    with pytest.raises(CoverageGap, match="stored nowhere"):
        require_stored(opened, replace(record, writers=(0, 2, 3)), Box((4, 0), (7, 2)))
    assert set(opened._fragments.maps) == {0, 2, 3}


# -- reading -----------------------------------------------------------------------------------------------------------


def fetched(path: Path, rows: tuple[int, int]) -> tuple[np.ndarray, FetchReport]:
    opened = open_records(path)
    into = np.full((rows[1] - rows[0], 2), 0xEE, dtype=np.uint32)
    report = fetch(opened, [Wanted(record_of(opened), Box((rows[0], 0), (rows[1], 2)), into)])
    return into.view(np.float32), report


@pytest.mark.parametrize("rows", [(0, 10), (3, 9), (3, 6), (4, 7), (2, 9), (0, 8)])
def test_pieces_in_a_row_are_read_at_once(path: Path, rows: tuple[int, int]) -> None:
    """Also those of which a part is needed."""
    found, report = fetched(path, rows)
    assert found.tolist() == [[2.0 * row, 2.0 * row + 1] for row in range(*rows)]
    assert report.reads == 1
    assert report.wanted_nbytes == 8 * (rows[1] - rows[0])


@pytest.fixture
def chunk(path: Path) -> Iterator[Path]:
    """The one chunk file; as it was afterwards."""
    (found,) = (one for one in path.rglob("c*") if one.is_file() and one.stat().st_size == 8 * ROWS)
    data = found.read_bytes()
    yield found
    found.write_bytes(data)


@pytest.mark.parametrize("row", range(ROWS))
def test_a_flipped_bit_is_found_in_the_piece_that_it_is_in(path: Path, chunk: Path, row: int) -> None:
    data = bytearray(chunk.read_bytes())
    data[8 * row] ^= 1
    chunk.write_bytes(data)
    writer = row // 3
    box = f"[{3 * writer}:{min(3 * writer + 3, ROWS)}, 0:2]"
    with pytest.raises(ChecksumMismatch) as raised:
        fetched(path, (0, ROWS))
    assert f"block 0 of piece {box} of array" in raised.value.message
    assert f"file offset {24 * writer}" in raised.value.message


def test_a_file_that_was_cut_is_named_with_its_array(path: Path, chunk: Path) -> None:
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(WrongLength, match=r"expected 80 bytes .* found 79; it holds array"):
        fetched(path, (0, ROWS))
