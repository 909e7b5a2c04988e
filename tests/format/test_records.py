"""Records come back as they were, and what does not hold together, or is too large, is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.errors import ChecksumMismatch, LimitExceeded, Malformed, Unsafe, ValueNotCarried
from elastickpt.format.arrays import ArrayId, ArraySpec, Box, Mesh
from elastickpt.format.decode_index import decode_index
from elastickpt.format.digest import block_checksum, file_digest
from elastickpt.format.encode_fragments import KnownFragments, decode_columns, decode_fragments, encode_fragments
from elastickpt.format.encode_index import encode_index
from elastickpt.format.encode_manifest import decode_manifest, encode_manifest
from elastickpt.format.keys import array_keys, chunk_file
from elastickpt.format.records import (
    ArrayRecord,
    Base,
    Field,
    FileDigest,
    FragmentMap,
    IndexEntry,
    IndexPart,
    Item,
    Layout,
    Manifest,
    OptimizerTable,
    StoredFile,
    StoredPiece,
)
from elastickpt.format.version import MAX_FRAGMENTS_NBYTES, MAX_MANIFEST_NBYTES, MAX_NODES

TABLE = OptimizerTable(
    "optimizer",
    (("model", "w"), ("critic", "w")),
    (Field("hyper", "betas", ((0.9, 0.999), None), (0, 1)), Field("scalar", "step", (3,), (0, -1))),
)


@st.composite
def pieces(draw: Any) -> StoredPiece:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    start = tuple(draw(st.integers(0, 9)) for _ in shape)
    box = Box(start, tuple(low + n for low, n in zip(start, shape, strict=True)))
    rows, row = draw(st.integers(1, 4)), draw(st.integers(1, 90_000))
    nbytes = rows * row
    stride = nbytes if rows == 1 else row + draw(st.integers(1, 9))
    sums = tuple(draw(st.integers(0, 2**64 - 1)) for _ in range(-(-nbytes // 65536)))
    key = f"params/m/{len(shape)}/value"
    return StoredPiece(key, box, draw(st.integers(0, 1)), draw(st.integers(0, 99)), nbytes, row, stride, sums)


@given(st.lists(pieces(), max_size=6), st.none() | st.dictionaries(st.just("/rng"), st.binary(max_size=3)))
def test_a_fragment_map_comes_back(found: list[StoredPiece], values: Any) -> None:
    ordered = tuple(sorted(found, key=lambda piece: piece.array))
    files = (StoredFile(0, "params/m/a/value/c", 10**7), StoredFile(1, "params/m/a/value/c", 10**7))
    fragments = FragmentMap(7, "3f1c", 65536, files, ordered, (TABLE,), values)
    data = encode_fragments(replace(fragments, pieces=tuple(found)))
    assert decode_fragments(data, path="f") == fragments
    columns = decode_columns(data, path="f")
    assert encode_fragments(columns) == data
    assert tuple(columns.pieces.by_array()) == columns.pieces.arrays
    for key, places in columns.pieces.by_array().items():
        assert [columns.pieces.piece(p) for p in places] == [p for p in ordered if p.array == key]


def _of_attempt(attempt: str, found: list[StoredPiece], values: Any, tables: tuple[OptimizerTable, ...]) -> FragmentMap:
    files = (StoredFile(0, f"packs/{attempt}-00007.bin", 10**7), StoredFile(1, "params/m/a/value/c", 10**7))
    ordered = tuple(sorted(found, key=lambda piece: piece.array))
    return FragmentMap(7, attempt, 65536, files, ordered, tables, values)


VALUES = st.none() | st.dictionaries(st.just("/rng"), st.binary(max_size=3))


@given(st.lists(pieces(), min_size=1, max_size=6), VALUES, VALUES, st.booleans(), st.data())
def test_the_map_of_the_next_save_is_known_but_for_what_changed(
    found: list[StoredPiece], first: Any, second: Any, tables: bool, data: st.DataObject
) -> None:
    before = encode_fragments(_of_attempt("3f1c", found, first, (TABLE,)))
    known = KnownFragments.of(decode_columns(before, path="f"), before)
    assert known is not None
    others = [replace(one, checksums=tuple(data.draw(st.integers(0, 2**64 - 1)) for _ in one.checksums)) for one in found]
    after = encode_fragments(_of_attempt("a0b1", others, second, (TABLE,) if tables else ()))
    columns = known.next(after, attempt="a0b1", path="f")
    assert columns is not None
    assert encode_fragments(columns) == after
    assert columns.pieces.offset is known.columns.pieces.offset
    assert not columns.pieces.checksums.flags.writeable
    assert known.next(after, attempt="a0b2", path="f") is None
    moved = [replace(others[0], offset=others[0].offset + 1), *others[1:]]
    assert known.next(encode_fragments(_of_attempt("a0b1", moved, second, ())), attempt="a0b1", path="f") is None
    assert known.next(encode_fragments(_of_attempt("a0b1", others[1:], second, ())), attempt="a0b1", path="f") is None


@given(st.lists(pieces(), min_size=1, max_size=3), st.integers(0, 10**6), st.integers(0, 7), st.booleans())
def test_a_damaged_map_of_the_next_save_is_seen_as_one_that_nothing_is_known_of(
    found: list[StoredPiece], at: int, bit: int, cut: bool
) -> None:
    before = encode_fragments(_of_attempt("3f1c", found, {"/rng": b"1"}, (TABLE,)))
    known = KnownFragments.of(decode_columns(before, path="f"), before)
    assert known is not None
    damaged = bytearray(encode_fragments(_of_attempt("a0b1", found, {"/rng": b"2"}, (TABLE,))))
    damaged[at % len(damaged)] ^= 1 << bit
    data = bytes(damaged[: at % len(damaged)] if cut else damaged)
    columns = known.next(data, attempt="a0b1", path="f")
    if columns is not None:
        assert encode_fragments(columns) == encode_fragments(decode_columns(data, path="f"))


def test_an_array_that_has_the_name_of_an_attempt_is_not_mistaken_for_it() -> None:
    piece = StoredPiece("params/m/3f1c/value", Box((0,), (5,)), 0, 0, 5, 5, 5, (1,))
    before = encode_fragments(_of_attempt("3f1c", [piece], None, ()))
    assert KnownFragments.of(decode_columns(before, path="f"), before) is None


def test_columns_are_read_only() -> None:
    columns = decode_columns(encode_fragments(FragmentMap(0, "a", 65536, (), ())), path="f").pieces
    for name in ("array", "offset", "start", "checksums", "axis_start", "checksum_start"):
        assert not getattr(columns, name).flags.writeable


def _record(array: ArrayId, key: str, **changes: Any) -> ArrayRecord:
    record = ArrayRecord(ArraySpec(array, (4, 6), "bfloat16"), key, (4, 6), 0, (0, 1, 2, 5))
    return replace(record, **changes)


@given(st.sets(st.tuples(st.sampled_from(["params", "extra"]), st.text("abAB/é.", max_size=5)), max_size=6))
def test_an_index_comes_back(names: set[tuple[Any, str]]) -> None:
    ids = [
        ArrayId("params", "m", name, state) for section, name in names if section == "params" for state in ("value", "exp_avg")
    ]
    ids += [ArrayId("extra", f"x{k}", name, "") for k, (section, name) in enumerate(sorted(names)) if section == "extra"]
    keys = array_keys(ids)
    own = (("true_shape", (3, 6)), ("composition", {"kind": "nf4"}))
    records = [_record(array, key, attributes=own if "b" in array.name else ()) for array, key in keys.items()]
    part = IndexPart(tuple(sorted(records, key=lambda record: record.key)), (TABLE,))
    assert decode_index(encode_index(part), path="index.msgpack") == part


def test_arrays_out_of_order_are_not_written() -> None:
    """[UCF-65]"""
    one, other = (_record(ArrayId("extra", item, "", ""), f"extra/{item}") for item in "ba")
    with pytest.raises(Malformed, match="order of their keys"):
        encode_index(IndexPart((one, other)))


def _index_of(parameters: int) -> bytes:
    """A mixture of experts: `parameters` weights with four states each, and a writer set for every eight of them."""
    records = [
        ArrayRecord(
            ArraySpec(ArrayId("params", "model", name, state), (2048, 7168), "float32"),
            f"params/model/{name}/{state}",
            (2048, 7168),
            0,
            (k // 8 % 10_000, k // 8 % 10_000 + 10_000),
        )
        for k in range(parameters)
        for name in (f"model.layers.{k // 768 + 3}.mlp.experts.{k // 3 % 256}.{('down', 'gate', 'up')[k % 3]}_proj.weight",)
        for state in ("exp_avg", "exp_avg_sq", "master", "value")
    ]
    return encode_index(IndexPart(tuple(sorted(records, key=lambda record: record.key))))


def test_an_index_of_a_large_model_fits_one_part() -> None:
    """178,176 arrays; here a sixteenth of them, which share less of what is shared."""
    data = _index_of(44_544 // 16)
    assert len(decode_index(data, path="i").arrays) == 178_176 // 16
    assert len(data) * 16 < MAX_MANIFEST_NBYTES / 2


@pytest.mark.long
def test_an_index_of_178176_arrays_fits_one_part() -> None:
    data = _index_of(44_544)
    assert len(data) < MAX_MANIFEST_NBYTES / 2
    assert len(decode_index(data, path="i").arrays) == 178_176


def manifest(**changes: Any) -> Manifest:
    found = Manifest(
        attempt="3f1c",
        step=100,
        time=1763700000.25,
        world_size=6,
        placement="plain",
        versions=(("torch", "2.13.0"), ("elastickpt", "0.1.0")),
        items=(Item("model", "module", "Net"), Item("optimizer", "optimizer", "AdamW")),
        meshes=(Mesh("w", ("dp", "tp"), (3, 2), (5, 4, 0, 1, 2, 3)),),
        layouts=(Layout(0, ("R", "_S(0)")),),
        index=(IndexEntry(FileDigest("index.msgpack", 5, "0" * 32), "params/a", "params/b"),),
        fragments=(FileDigest("fragments/00000.msgpack", 5, "f" * 32),),
        values={"/scheduler": {"milestones": [1, (2, 3.0)]}},
        tied=((("model", "a"), ("model", "b")),),
        bases=(Base("../step-1", "a" * 32),),
        layout_text="mesh é",
    )
    return replace(found, **changes)


@given(st.lists(st.integers(0, 40), unique=True, min_size=1), st.none() | st.integers(0, 2**62))
def test_a_manifest_comes_back(ranks: list[int], step: int | None) -> None:
    found = manifest(meshes=(Mesh("w", ("a", "b"), (1, len(ranks)), tuple(ranks)),), step=step)
    assert decode_manifest(encode_manifest(found), path="checkpoint.json") == found


def test_any_flipped_bit_of_a_manifest_is_found() -> None:
    """[UCF-74]"""
    data = encode_manifest(manifest())
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises((ChecksumMismatch, Malformed)):
                decode_manifest(bytes(flipped), path="checkpoint.json")


def test_a_value_that_cannot_be_carried_is_refused_before_a_byte_exists() -> None:
    """[UCF-59]"""
    with pytest.raises(ValueNotCarried, match=r"^/scheduler/f: a function"):
        encode_manifest(manifest(values={"/scheduler": {"f": lambda: 0}}))
    with pytest.raises(ValueNotCarried, match=r"^/optimizer/lr/0: a "):
        encode_index(IndexPart((), (replace(TABLE, fields=(Field("hyper", "lr", (iter(()),), (0, 0)),)),)))


@pytest.mark.parametrize(
    ("decode", "limit"),
    [
        (decode_manifest, MAX_MANIFEST_NBYTES),
        (decode_index, MAX_MANIFEST_NBYTES),
        (decode_columns, MAX_FRAGMENTS_NBYTES),
    ],
)
def test_a_record_beyond_its_limit_is_not_looked_at(decode: Any, limit: int) -> None:
    """[UCF-90]"""

    class Claims(bytes):
        def __len__(self) -> int:
            return limit + 1

    with pytest.raises(LimitExceeded, match=str(limit)):
        decode(Claims(), path="record")


def test_many_small_values_in_few_bytes_are_refused() -> None:
    """[UCF-91]: one byte a list in msgpack, three in JSON, sixty and more in memory."""
    inner = [[]] * 2048
    bomb = msgpack.packb({"x": [inner] * (MAX_NODES // 2048 + 1)})
    with pytest.raises(LimitExceeded):
        decode_index(bomb, path="i")
    values = encode_manifest(manifest(values={})).replace(b'"values":{}', b'"values":{"/a":[' + b"[]," * MAX_NODES + b"0]}")
    body = values[: -len(b',"digest":""}\n') - 32]
    sealed = body + b',"digest":"' + file_digest(body).encode() + b'"}\n'
    with pytest.raises(LimitExceeded):
        decode_manifest(sealed, path="checkpoint.json")


def test_lengths_that_wrap_around_are_refused() -> None:
    """Sums of columns stay in 64 bits, whatever stands in them."""
    for offset, nbytes, size in ((2**62, 2**62, 2**62), (0, 2**62, 2**62), (2**62, 1, 2**62)):
        piece = StoredPiece("params/m/w/value", Box((0,), (1,)), 0, offset, nbytes, nbytes, nbytes, ())
        files = (StoredFile(0, "params/m/w/value/c.0", size),)
        with pytest.raises(Malformed):
            decode_columns(encode_fragments(FragmentMap(0, "a", 65536, files, (piece,))), path="f")


def test_checksums_are_those_of_the_specification() -> None:
    """[UCF-40, UCF-41]: values of the reference implementation."""
    assert file_digest(b"") == "99aa06d3014798d86001c324468d497f"
    assert block_checksum(b"") == 0x2D06800538D394C2
    assert block_checksum(memoryview(np.arange(6, dtype="<i4").reshape(2, 3))) == block_checksum(
        np.arange(6, dtype="<i4").tobytes()
    )


def test_a_map_of_many_pieces_keeps_each_apart() -> None:
    """Flat columns are cut by running sums: a piece of another number of axes shifts all after it."""
    shapes = [(), (3,), (2, 2), (), (1, 1, 1), (5,)] * 50
    found = [
        StoredPiece(f"params/m/{k:04d}/value", Box.whole(shape), 0, at, n, n, n, (k,))
        for k, (shape, at) in enumerate(zip(shapes, accumulate([4] * 300, initial=0), strict=False))
        for n in (4,)
    ]
    data = encode_fragments(FragmentMap(0, "a", 65536, (StoredFile(0, chunk_file("x", ()), 1200),), tuple(found)))
    assert decode_fragments(data, path="f").pieces == tuple(found)


def test_what_no_reader_would_take_is_not_written() -> None:
    """[UCF-91, UCF-30, UCF-78]: a save must not succeed with a record that its own load refuses."""
    many = {"/sampler": [0] * (MAX_NODES + 1)}
    with pytest.raises(ValueNotCarried, match="as tensors"):
        encode_fragments(FragmentMap(0, "a", 65536, (), (), (), many))
    with pytest.raises(ValueNotCarried, match="as tensors"):
        encode_manifest(manifest(values=many))
    with pytest.raises(Unsafe):
        encode_manifest(manifest(items=(Item("a\nb", "values", "dict"),)))
    array = _record(ArrayId("extra", "x", "", ""), "extra/x", attributes=(("note", "x" * (1 << 20)),))
    with pytest.raises(ValueNotCarried, match="attributes"):
        encode_index(IndexPart((array,)))
