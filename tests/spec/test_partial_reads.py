"""A part of an array is read by whole blocks, each verified: damage elsewhere does not matter, damage beside does. [FRAG-33]"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import elastickpt as ek
from elastickpt.errors import ChecksumMismatch
from elastickpt.format.arrays import ArrayId, Box
from elastickpt.loading.fetch import fetch
from elastickpt.loading.opened import open_records
from elastickpt.loading.targets import Wanted

ROWS, COLUMNS = 1024, 64  # rows of 256 bytes, so 256 rows a block, 4 blocks
BLOCK_ROWS = 256
X = ArrayId("extra", "x", "", "")
FILE = "extra/x/c.0.0"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ek.save({"x": torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)}, tmp_path / "c")
    return tmp_path / "c"


def _flip(path: Path, row: int, column: int) -> None:
    with open(path / FILE, "r+b") as file:
        file.seek((row * COLUMNS + column) * 4)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def _rows(low: int, high: int) -> Box:
    return Box((low, 0), (high, COLUMNS))


@pytest.mark.parametrize("part", [_rows(0, 1), _rows(10, 500), _rows(767, 768), Box((0, 3), (700, 4))])
def test_damage_in_a_block_that_is_not_needed_does_not_matter(saved: Path, part: Box) -> None:
    _flip(saved, 1000, 0)
    whole = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)
    wanted = whole[tuple(slice(low, high) for low, high in zip(part.start, part.stop, strict=True))]
    assert (ek.open(saved).read(X, box=part) == wanted).all()


@pytest.mark.parametrize("part", [_rows(768, 769), _rows(1001, 1024), _rows(0, ROWS), Box((900, 50), (901, 51))])
def test_damage_in_a_block_that_is_needed_is_refused_though_its_bytes_are_not(saved: Path, part: Box) -> None:
    _flip(saved, 1000, 0)
    with pytest.raises(ChecksumMismatch, match="block 3"):
        ek.open(saved).read(X, box=part)


def test_every_block_of_a_part_is_verified_alone(saved: Path) -> None:
    _flip(saved, 300, 7)
    checkpoint = ek.open(saved)
    for block in range(ROWS // BLOCK_ROWS):
        part = _rows(block * BLOCK_ROWS + 100, (block + 1) * BLOCK_ROWS - 100)
        if block == 1:
            with pytest.raises(ChecksumMismatch):
                checkpoint.read(X, box=part)
        else:
            checkpoint.read(X, box=part)


def test_a_part_costs_its_bytes_and_no_more_than_two_blocks(saved: Path) -> None:
    opened = open_records(saved)
    into = np.empty((300, COLUMNS), dtype="<u4")
    report = fetch(opened, [Wanted(opened.records[X], _rows(200, 500), into)])
    assert report.wanted_nbytes == into.nbytes
    assert report.read_nbytes == 2 * BLOCK_ROWS * COLUMNS * 4
