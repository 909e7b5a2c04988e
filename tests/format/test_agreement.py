"""The place of a piece in its chunk is what a slow look at every element gives, and what layout makes."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.errors import Malformed
from elastickpt.format.agreement import check_fragments, check_writers
from elastickpt.format.array_columns import ArrayColumns
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.format.encode_fragments import decode_columns, encode_fragments
from elastickpt.format.encode_manifest import encode_manifest
from elastickpt.format.keys import chunk_file
from elastickpt.format.piece_columns import distinct
from elastickpt.format.records import (
    ArrayRecord,
    FileDigest,
    FragmentMap,
    IndexEntry,
    Manifest,
    StoredFile,
    StoredPiece,
)
from elastickpt.layout.grid import runs_of

MANIFEST = Manifest(
    attempt="a",
    step=None,
    time=0.5,
    world_size=1,
    placement="plain",
    versions=(),
    items=(),
    meshes=(),
    layouts=(),
    index=(IndexEntry(FileDigest("index.msgpack", 0, "0" * 32), "", ""),),
    fragments=(),
    values={},
)


@st.composite
def grids(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], Box]:
    """A shape, a chunk shape and a box that is not empty."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    chunk = tuple(draw(st.integers(1, extent)) for extent in shape)
    start = tuple(draw(st.integers(0, extent - 1)) for extent in shape)
    stop = tuple(draw(st.integers(low + 1, extent)) for low, extent in zip(start, shape, strict=True))
    return shape, chunk, Box(start, stop)


def _record(shape: tuple[int, ...], chunk: tuple[int, ...]) -> ArrayRecord:
    spec = ArraySpec(ArrayId("params", "m", "w", "value"), shape, "int32")
    return ArrayRecord(spec, "params/m/w/value", chunk, None, (0,))


def _map(record: ArrayRecord, box: Box) -> FragmentMap:
    runs = runs_of(box, shape=record.spec.shape, chunk_shape=record.chunk_shape, itemsize=4)
    chunks = list(dict.fromkeys(run.chunk for run in runs))
    nbytes = 4 * prod(record.chunk_shape)
    pieces = [
        StoredPiece(record.key, run.box, chunks.index(run.chunk), run.offset, run.nbytes, run.row_nbytes, run.row_stride, (0,))
        for run in runs
    ]
    files = tuple(StoredFile(0, chunk_file(record.key, chunk), nbytes) for chunk in chunks)
    return FragmentMap(0, "a", 65536, files, tuple(pieces))


def _check(fragments: FragmentMap, record: ArrayRecord) -> None:
    columns = decode_columns(encode_fragments(fragments), path="f")
    check_fragments(columns, ArrayColumns.of([record]), manifest=MANIFEST, writer=0)


def _bytes_of(piece: StoredPiece) -> list[int]:
    rows = range(piece.nbytes // piece.row_nbytes)
    return [piece.offset + r * piece.row_stride + b for r in rows for b in range(0, piece.row_nbytes, 4)]


@given(grids())
def test_what_layout_makes_agrees_and_is_where_every_element_is(
    grid: tuple[tuple[int, ...], tuple[int, ...], Box],
) -> None:
    """[FRAG-44]"""
    shape, chunk, box = grid
    record = _record(shape, chunk)
    fragments = _map(record, box)
    _check(fragments, record)
    for piece in fragments.pieces:
        cells = np.arange(prod(chunk)).reshape(chunk) * 4
        local = tuple(
            slice(low % n, low % n + extent) for low, extent, n in zip(piece.box.start, piece.box.shape, chunk, strict=True)
        )
        assert _bytes_of(piece) == cells[local].reshape(-1).tolist()


@given(grids(), st.data())
def test_a_piece_moved_by_an_element_is_refused(
    grid: tuple[tuple[int, ...], tuple[int, ...], Box], data: st.DataObject
) -> None:
    """[FRAG-44]"""
    shape, chunk, box = grid
    record = _record(shape, chunk)
    fragments = _map(record, box)
    at = data.draw(st.integers(0, len(fragments.pieces) - 1))
    moved = replace(fragments.pieces[at], offset=fragments.pieces[at].offset + 4)
    with pytest.raises(Malformed):
        _check(replace(fragments, pieces=(*fragments.pieces[:at], moved, *fragments.pieces[at + 1 :])), record)


def test_boxes_that_need_two_strides_are_no_piece() -> None:
    """[FRAG-44]: 2 x 2 x 2 of a 4 x 4 x 4 chunk; any one stride is wrong."""
    record = _record((4, 4, 4), (4, 4, 4))
    for stride in (16, 32, 64):
        piece = StoredPiece(record.key, Box((0, 0, 0), (2, 2, 2)), 0, 0, 32, 8, stride, (0,))
        files = (StoredFile(0, chunk_file(record.key, (0, 0, 0)), 256),)
        with pytest.raises(Malformed, match="another place"):
            _check(FragmentMap(0, "a", 65536, files, (piece,)), record)


def test_a_writer_without_pieces_is_no_writer() -> None:
    """[FRAG-26]"""
    record = _record((4,), (4,))
    check_writers([record], [[record.key]])
    for held in ([], [[]]):
        with pytest.raises(Malformed, match="lists writer 0"):
            check_writers([record], held)


def test_the_manifest_of_these_tests_is_one() -> None:
    assert encode_manifest(MANIFEST)


@given(st.lists(st.integers(-3, 3), max_size=12))
def test_distinct_values_are_those_of_numpy(entries: list[int]) -> None:
    column = np.array(entries, dtype=np.int64)
    found, expected = distinct(column), np.unique(column, return_index=True, return_inverse=True)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.tolist() == theirs.tolist()
