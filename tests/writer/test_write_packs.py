"""A pack's bytes: put together from pieces in a row and in rows, from large and small ones, by stores of each kind."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import elastickpt as ek
from elastickpt.errors import CapabilityMissing, NoSpace
from elastickpt.format.arrays import Box
from elastickpt.format.digest import block_checksum
from elastickpt.layout.grid import ByteRun
from elastickpt.layout.packs import place_slots, slots_of
from elastickpt.storage.local import LocalStore
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import Store
from elastickpt.writer import arena_plan, write_packs
from elastickpt.writer.arena_plan import PackSpan, spans_of
from elastickpt.writer.plans import BLOCK_NBYTES, PlannedFile, PlannedPack, PlannedPiece, Slice, whole_pieces
from elastickpt.writer.write_files import Bytes, Source, WrittenFolder, unwatched

MIB = 1 << 20
# (elements of a box, extents of its chunk): a whole chunk, an edge chunk in rows, one in planes, a part of a chunk
Held = tuple[tuple[int, ...], tuple[int, ...]]


def pack_of(held: list[Held]) -> tuple[PlannedPack, list[Bytes]]:
    """The pack of these boxes of bytes, each at the beginning of its array, and the bytes of each piece."""
    slots = [slot for shape, chunk in held for slot in slots_of(Box.whole(shape), shape=shape, chunk_shape=chunk, itemsize=1)]
    offsets, nbytes = place_slots(slot.nbytes for slot in slots)
    runs: list[ByteRun] = []
    for slot, offset in zip(slots, offsets, strict=True):
        runs += [run.moved(offset) for run in slot.runs]
    random = np.random.default_rng(0)
    data = [random.integers(1, 256, run.nbytes, dtype=np.uint8) for run in runs]
    pieces = tuple(PlannedPiece(0, run.box, run) for run in runs)
    return PlannedPack("packs/a-00000.bin", nbytes, pieces), data


def expected(pack: PlannedPack, data: list[Bytes]) -> bytes:
    """Byte by byte."""
    whole = np.zeros(pack.nbytes, dtype=np.uint8)
    for piece, own in zip(pack.pieces, data, strict=True):
        for row in range(piece.run.nbytes // piece.run.row_nbytes):
            at = piece.run.offset + row * piece.run.row_stride
            whole[at : at + piece.run.row_nbytes] = own[row * piece.run.row_nbytes : (row + 1) * piece.run.row_nbytes]
    return whole.tobytes()


class Pieces(Source):
    def __init__(self, data: list[Bytes]) -> None:
        self._data = data

    def take(self, at: Slice, start: int, stop: int) -> Bytes:
        return self._data[at.piece][start:stop]


@pytest.fixture(params=["local", "memory", "in order"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path)
    found = MemoryStore(f"test-{uuid.uuid4().hex}")
    if request.param == "in order":
        found.capabilities = replace(found.capabilities, ranged_writes=False, sequential_only=True)
    return found


def write(store: Store, pack: PlannedPack, data: list[Bytes], slices: tuple[Slice, ...]) -> np.ndarray:
    store.make_directories("draft")
    spans = spans_of(pack, slices, write_packs.span_nbytes(store))
    return write_packs.write_pack(WrittenFolder(store, "draft", "none", unwatched), pack, spans, Pieces(data))


CASES: dict[str, list[Held]] = {
    "small": [((n % 70 + 1,), (n % 70 + 1,)) for n in range(300)],
    "large": [((3 * MIB + 5,), (3 * MIB + 5,)), ((7,), (7,)), ((9 * MIB,), (9 * MIB,)), ((1,), (1,))],
    "rows": [((300, 500), (300, 600)), ((5,), (5,)), ((3000, 999), (3000, 1000))],
    "rows far apart": [((2000, 3), (2000, 64)), ((5,), (5,))],
    "planes": [((3, 40, 50), (4, 60, 60)), ((9, 9, 9), (10, 10, 10))],
    "pads behind": [((200, 8000), (300, 8000)), ((64,), (64,)), ((40,), (4000,)), ((64,), (64,))],
}


@pytest.mark.parametrize("case", CASES)
def test_a_pack_is_its_pieces_and_zeros(store: Store, case: str) -> None:
    """[FRAG-61, FRAG-62, UCF-18]"""
    pack, data = pack_of(CASES[case])
    checksums = write(store, pack, data, whole_pieces((pack,)))
    assert store.read("draft/packs/a-00000.bin", 1 << 30) == expected(pack, data)
    blocks = [own[k : k + BLOCK_NBYTES] for own in data for k in range(0, own.size, BLOCK_NBYTES)]
    assert checksums.tolist() == [block_checksum(block.data) for block in blocks]


def _parts(pack: PlannedPack, cuts: list[int]) -> Iterator[tuple[Slice, ...]]:
    """The pieces in portions: the n-th one ends in the middle of piece `cuts[n]`, or behind it."""
    portion: list[Slice] = []
    for number, piece in enumerate(pack.pieces):
        middle = piece.run.nbytes // 2 // BLOCK_NBYTES * BLOCK_NBYTES
        if number in cuts and middle:
            yield (*portion, Slice(0, number, 0, middle))
            portion = [Slice(0, number, middle, piece.run.nbytes)]
        else:
            portion.append(Slice(0, number, 0, piece.run.nbytes))
            if number in cuts:
                yield tuple(portion)
                portion = []
    if portion:
        yield tuple(portion)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from([held for case in CASES.values() for held in case]), min_size=1, max_size=12), st.data())
def test_portions_make_the_same(tmp_path: Path, held: list[Held], data: st.DataObject) -> None:
    """[FRAG-63]"""
    pack, own = pack_of(held)
    cuts = data.draw(st.lists(st.integers(0, len(pack.pieces) - 1), max_size=3, unique=True))
    store = LocalStore(tmp_path)
    store.remove_tree("draft")
    whole = [write(store, pack, own, slices) for slices in _parts(pack, cuts)]
    assert store.read("draft/packs/a-00000.bin", 1 << 30) == expected(pack, own)
    blocks = [part[k : k + BLOCK_NBYTES] for part in own for k in range(0, part.size, BLOCK_NBYTES)]
    assert np.concatenate(whole).tolist() == [block_checksum(block.data) for block in blocks]


def test_a_later_save_of_a_structure_finds_what_it_writes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of plans that knows four packs forgets the first of five: they belong to the structure."""
    laid: list[str] = []
    lay = arena_plan.spans_of

    def counting(pack: PlannedFile, slices: Sequence[Slice], *sizes: int) -> tuple[PackSpan, ...]:
        laid.append(pack.path)
        return lay(pack, slices, *sizes)

    monkeypatch.setattr(arena_plan, "spans_of", counting)
    for number in range(2):
        for width in range(5, 10):
            path = tmp_path / f"{number}-{width}"
            ek.save({"model": torch.nn.Linear(width, width)}, path, placement="packed")
            assert ek.open(path).verify().problems == ()
    assert len(laid) == 5


def test_what_fails_in_the_middle_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, data = pack_of(CASES["large"])
    written: list[int] = []

    def full(self: object, offset: int, data: memoryview) -> None:
        written.append(offset)
        if len(written) > 1:
            raise NoSpace("write: No space left on device")

    monkeypatch.setattr("elastickpt.storage.ranges.LocalWriter.write", full)
    with pytest.raises(NoSpace):
        write(LocalStore(tmp_path), pack, data, whole_pieces((pack,)))


def test_a_store_that_takes_bytes_in_order_is_not_asked_to_go_back() -> None:
    writer = write_packs._FrontToBack(MemoryStore(f"test-{uuid.uuid4().hex}").open_writer("f", 10), "f")
    writer.write(4, memoryview(b"ab"))
    with pytest.raises(CapabilityMissing, match="byte 5 after byte 6"):
        writer.write(5, memoryview(b"c"))
