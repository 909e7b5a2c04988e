"""Which fragment maps a load reads: those of writers that by the layout held any of it. [FRAG-35]"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import elastickpt as ek
from elastickpt.errors import CoverageGap
from elastickpt.format.box import Box
from elastickpt.format.records import ArrayRecord
from elastickpt.load.opened import Opened, open_records
from elastickpt.load.plan import require_stored
from elastickpt.testing.ranks import run_ranks

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
    return set(opened._fragments.maps), [(piece.box.start[0], piece.box.stop[0]) for _, piece in found]


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
