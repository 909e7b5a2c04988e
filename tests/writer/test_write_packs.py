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
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.format.digest import block_checksum
from elastickpt.format.memory_views import address_of
from elastickpt.layout.packs import PackSlot, place_slots, slots_of
from elastickpt.saving.staging import Stager, part_of
from elastickpt.storage.local import LocalStore
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import RangeWriter, Store
from elastickpt.training.held import HeldArray
from elastickpt.writer import arena_plan, write_packs
from elastickpt.writer.arena import Arena, ArenaSource
from elastickpt.writer.arena_plan import PackSpan, prepare, spans_of
from elastickpt.writer.plans import (
    BLOCK_NBYTES,
    MIN_ARENA_NBYTES,
    PlannedFile,
    PlannedPack,
    PlannedPiece,
    Slice,
    WritePlan,
    whole_pieces,
)
from elastickpt.writer.write_files import Bytes, Source, WrittenFolder, unwatched

MIB = 1 << 20
# (elements of a box, extents of its chunk): a whole chunk, an edge chunk in rows, one in planes, a part of a chunk
Held = tuple[tuple[int, ...], tuple[int, ...]]


def held_of(held: list[Held]) -> list[Bytes]:
    """The bytes of these boxes, none of them zero."""
    random = np.random.default_rng(0)
    return [random.integers(1, 256, shape, dtype=np.uint8) for shape, _ in held]


def pack_of(held: list[Held]) -> tuple[PlannedPack, list[Bytes]]:
    """The pack of these boxes of bytes, each at the beginning of its array, and the bytes of each piece."""
    slots: list[PackSlot] = []
    arrays: list[int] = []
    for number, (shape, chunk) in enumerate(held):
        found = list(slots_of(Box.whole(shape), shape=shape, chunk_shape=chunk, itemsize=1))
        slots += found
        arrays += [number] * len(found)
    offsets, nbytes = place_slots(slot.nbytes for slot in slots)
    pieces: list[PlannedPiece] = []
    for slot, offset, number in zip(slots, offsets, arrays, strict=True):
        pieces += [PlannedPiece(number, run.box, run.moved(offset)) for run in slot.runs]
    sources = held_of(held)
    data = [np.ascontiguousarray(part_of(sources[piece.array], piece.local)).reshape(-1) for piece in pieces]
    return PlannedPack("packs/a-00000.bin", nbytes, tuple(pieces)), data


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


def stage_and_write(store: Store, held: list[Held], pack: PlannedPack, arena: Arena, arena_nbytes: int | None) -> list[int]:
    """The pack through that arena; how many bytes of it were written from where they were staged."""
    store.make_directories("draft")
    plan = WritePlan(tuple(f"p{n}" for n in range(len(held))), (pack,), ())
    prepared = prepare(plan, (), arena_nbytes=arena_nbytes)
    stager = Stager(prepared)
    arrays = [
        HeldArray(
            ArraySpec(ArrayId("extra", "t", f"x{n}", ""), own.shape, "uint8"),
            Box.whole(own.shape),
            torch.from_numpy(own),
            "other",
            "declared",
            replicas=(0,),
        )
        for n, own in enumerate(held_of(held))
    ]
    low = arena.memory.ctypes.data
    in_place: list[int] = []
    real = store.open_writer

    def open_writer(path: str, nbytes: int | None) -> RangeWriter:
        found = real(path, nbytes)
        put = found.write

        def write(offset: int, data: memoryview) -> None:
            if low <= address_of(data) < low + arena.nbytes:
                in_place.append(data.nbytes)
            put(offset, data)

        found.write = write  # type: ignore[method-assign]
        return found

    store.open_writer = open_writer  # type: ignore[method-assign]
    for number in range(len(prepared.portions)):
        arena.empty()
        stager.stage(arena, number, arrays)
        source = ArenaSource(arena, unwatched)
        spans = prepared.spans(number, write_packs.span_nbytes(store))
        write_packs.write_pack(WrittenFolder(store, "draft", "none", unwatched), pack, spans, source)
    store.open_writer = real  # type: ignore[method-assign]
    return in_place


@pytest.mark.parametrize("arena_nbytes", [None, MIN_ARENA_NBYTES, 3 * MIB])
def test_a_pack_out_of_an_arena_is_the_same_whatever_lay_there(store: Store, arena_nbytes: int | None) -> None:
    """[FRAG-62, FRAG-63]"""
    if arena_nbytes is not None and store.capabilities.sequential_only:
        pytest.skip("such a store takes a pack in one portion")
    arena = Arena.create(64 * MIB)
    arena.memory[:] = 0xEE
    for case in [*CASES, *CASES]:
        pack, data = pack_of(CASES[case])
        store.remove_tree("draft")
        stage_and_write(store, CASES[case], pack, arena, arena_nbytes)
        assert store.read("draft/packs/a-00000.bin", 1 << 30) == expected(pack, data), case
    arena.close()


def test_large_pieces_are_written_from_where_they_were_staged(tmp_path: Path) -> None:
    """Nothing of them is copied a second time."""
    held: list[Held] = [((7,), (7,)), ((9 * MIB,), (9 * MIB,)), ((700,), (700,)), ((3 * MIB,), (3 * MIB,))]
    pack, _ = pack_of(held)
    arena = Arena.create(2 * pack.nbytes)
    in_place = stage_and_write(LocalStore(tmp_path), held, pack, arena, None)
    assert sorted(nbytes for nbytes in in_place if nbytes >= MIB) == [MIB, 3 * MIB, 8 * MIB]
    arena.close()


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
