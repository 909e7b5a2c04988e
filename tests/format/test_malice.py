"""Whatever stands in a record, a reader returns or refuses it by its own errors: nothing else, and nothing large."""

from __future__ import annotations

import base64
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elastickpt.errors import CheckpointError
from elastickpt.format.agreement import check_fragments, check_index
from elastickpt.format.canonical_json import parse
from elastickpt.format.decode_index import decode_index
from elastickpt.format.decode_values import decode_value
from elastickpt.format.encode_fragments import decode_columns
from elastickpt.format.encode_manifest import decode_manifest

VECTORS = Path(__file__).parent.parent.parent / "spec" / "vectors"
TAGS = ["$tuple", "$bytes", "$map", "$counter", "$odict", "$set", "$frozenset", "$float", "$int", "$complex", "$array"]
TAGS += ["$tensor", "$new"]
_small = st.integers() | st.binary(max_size=24) | st.text(max_size=4) | st.none() | st.booleans() | st.floats()
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(TAGS), inner, max_size=2)
        | st.lists(st.lists(inner, min_size=2, max_size=2), max_size=2)
    ),
    max_leaves=8,
)


def _files(name: str) -> dict[str, bytes]:
    vector = json.loads((VECTORS / "checkpoints/valid" / f"{name}.json").read_text())
    return {path: base64.b64decode(data) for path, data in vector["input"]["files"].items()}


FILES = _files("four-arrays")
MANIFEST = decode_manifest(FILES["checkpoint.json"], path="checkpoint.json")
INDEX = FILES["index.msgpack"]
RECORDS = check_index([decode_index(INDEX, path="i")], MANIFEST)


def _read_fragments(data: bytes) -> None:
    check_fragments(decode_columns(data, path="f"), RECORDS, manifest=MANIFEST, writer=0)


def _read_index(data: bytes) -> None:
    check_index([decode_index(data, path="i")], MANIFEST)


READERS = [(FILES["fragments/00000.msgpack"], _read_fragments), (INDEX, _read_index)]


def _tolerant(read: Callable[[bytes], object], data: bytes) -> None:
    message = ""
    try:
        read(data)
    except CheckpointError as error:
        message = error.message
    assert len(message) < 10_000  # it is for people


@pytest.mark.parametrize(("data", "read"), READERS, ids=["fragments", "index"])
def test_every_flipped_bit_is_read_or_refused(data: bytes, read: Callable[[bytes], object]) -> None:
    for at in range(len(data)):
        for bit in (0, 3, 6, 7):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            _tolerant(read, bytes(flipped))


@pytest.mark.parametrize(("data", "read"), READERS, ids=["fragments", "index"])
def test_every_cut_is_refused(data: bytes, read: Callable[[bytes], object]) -> None:
    """[UCF-45]"""
    for stop in range(len(data)):
        with pytest.raises(CheckpointError):
            read(data[:stop])


def _places(record: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return [path, *(place for key, one in below for place in _places(one, (*path, key)))]


@pytest.mark.parametrize(("data", "read"), READERS, ids=["fragments", "index"])
@given(draw=st.data())
def test_any_value_at_any_place_is_read_or_refused(data: bytes, read: Callable[[bytes], object], draw: st.DataObject) -> None:
    record = msgpack.unpackb(data)
    place = draw.draw(st.sampled_from(_places(record)[1:]))
    target = record
    for step in place[:-1]:
        target = target[step]
    value: Any = draw.draw(_small | st.just([]) | st.just({}))
    if type(value) is int and not -(2**63) <= value < 2**64:
        value = 2**63
    target[place[-1]] = value
    _tolerant(read, msgpack.packb(record))


@given(_JSON)
@example({"$set": [{"$tuple": [[]]}]})
@example({"$map": [[{"$array": {}}, 1]]})
def test_any_json_is_a_value_or_refused(typed: Any) -> None:
    _tolerant(lambda data: decode_value(parse(data, where="v"), where="v"), json.dumps(typed).encode())


@given(st.binary(max_size=40))
def test_any_bytes_are_refused_as_a_manifest(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        decode_manifest(data, path="checkpoint.json")


@pytest.mark.parametrize(
    "claim",
    [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"],
    ids=["list", "map", "bin", "text"],
)
def test_a_claimed_length_takes_no_memory(claim: bytes) -> None:
    """[UCF-91]"""
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        decode_index(b"\x81\xa6format" + claim, path="i")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
