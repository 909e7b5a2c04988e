"""Long texts are read by their types only where that says the same as reading them as any JSON; all else is left to `parse`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from elastickpt.errors import Malformed
from elastickpt.format.canonical_json import dump, parse
from elastickpt.format.decode_values import decode_pointers, decode_value
from elastickpt.format.digest import SEAL_NBYTES, seal_text
from elastickpt.format.encode_manifest import decode_manifest, encode_manifest
from elastickpt.format.long_texts import LONG, decode_text, members_in, references_in
from elastickpt.format.records import FileDigest, IndexEntry, Manifest
from elastickpt.format.values import ArrayReference

TREE = {f"t{k}": ArrayReference("state", f"a/t{k}") for k in range(200)}
SPELLED = {name: {"$tensor": {"item": one.item, "name": one.name}} for name, one in TREE.items()}
TEXT = dump(SPELLED)
NINE = '"$tensor":{"item":"state","name":"a/t9"}'
MANIFEST = Manifest(
    world_size=1,
    placement="packed",
    versions=(("elastickpt", "0"),),
    items=(),
    meshes=(),
    layouts=(),
    attempt="ab",
    step=1,
    time=1.5,
    index=(IndexEntry(FileDigest("index.msgpack", 1, "0" * 32), "", ""),),
    fragments=(),
    values={"/state": TREE, "/step": 3, "/list": [1.5, None, "x"]},
)


def test_a_long_text_of_references_is_what_it_spells() -> None:
    assert len(TEXT) > LONG
    assert references_in(TEXT) == decode_value(parse(TEXT, where="w"), where="w") == TREE
    assert decode_text(TEXT, where="w") == TREE


ODD: dict[str, Callable[[str], str]] = {
    "a member that stands twice": lambda text: text.replace('"t7":', '"t8":'),
    "a space": lambda text: text.replace('"item":"state"', '"item": "state"', 1),
    "a tag in place of a name": lambda text: text.replace('"t7":{', '"$7":{'),
    "one member more": lambda text: text.replace('"name":"a/t7"', '"name":"a/t7","origin":"numpy"'),
    "the same member twice": lambda text: text.replace('"name":"a/t7"', '"name":"a/t7","name":"a/t7"'),
    "another type": lambda text: text.replace('"name":"a/t7"', '"name":7'),
    "an empty object": lambda text: text.replace('{"$tensor":{"item":"state","name":"a/t9"}}', "{}"),
    "an end too soon": lambda text: text[:-1],
    "an escape": lambda text: text.replace("a/t7", "a\\/t7"),
    "a value": lambda text: text.replace('{"$tensor":{"item":"state","name":"a/t9"}}', "9"),
    "two tags": lambda text: text.replace(NINE, f"{NINE},{NINE}"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_spelled_otherwise_is_left_to_others(odd: str) -> None:
    text = ODD[odd](TEXT)
    assert text != TEXT
    assert references_in(text) is None
    assert references_in("x" + text) is None
    outcome = _outcome(lambda: decode_value(parse(text, where="w"), where="w"))
    assert _outcome(lambda: decode_text(text, where="w")) == outcome
    assert _outcome(lambda: decode_manifest(sealed(text), path="m")) == _outcome(lambda: slowly(sealed(text)))


def _outcome(read: Callable[[], object]) -> object:
    try:
        return read()
    except Malformed as error:
        return error.kind, error.message


def sealed(text: str) -> bytes:
    """The manifest with this text in place of its tree."""
    data = encode_manifest(MANIFEST)[:-SEAL_NBYTES].decode()
    return seal_text(data.replace(TEXT, text) + "}", where="m")


def slowly(data: bytes) -> Manifest:
    """The manifest as any JSON."""
    members = parse(data, where="m")
    assert isinstance(members, dict)
    values = decode_pointers(members["values"], where="m/values")
    members["values"] = {}
    rest = {name: one for name, one in members.items() if name != "digest"}
    return replace(decode_manifest(seal_text(dump(rest), where="m"), path="m"), values=values)


def test_a_manifest_is_read_alike_both_ways() -> None:
    data = encode_manifest(MANIFEST)
    assert decode_manifest(data, path="m") == slowly(data) == MANIFEST


REPLACED = [
    ('"/step":3', '"/list":3'),
    ('"/step":3', '"/step": 3'),
    ('"/step":3', '"step":3'),
    (',"tied":[]', ',"tied":[],"values":{}'),
]


@pytest.mark.parametrize(("old", "new"), REPLACED)
def test_values_that_are_not_as_they_are_spelled_are_read_as_any_json(old: str, new: str) -> None:
    text = encode_manifest(MANIFEST)[:-SEAL_NBYTES].decode()
    data = seal_text(text.replace(old, new) + "}", where="m")
    assert old in text
    assert _outcome(lambda: decode_manifest(data, path="m")) == _outcome(lambda: slowly(data))


def test_the_members_of_a_long_object_are_texts() -> None:
    text = dump({"/a": SPELLED, "/b": 3, "/c": [1.5, "x"]})
    assert members_in(text) == {"/a": TEXT, "/b": "3", "/c": '[1.5,"x"]'}
    assert members_in(text.replace('"/b"', '"/a"')) is None
    assert members_in(text[:-1]) is None
    assert members_in(dump({"/b": 3})) is None
