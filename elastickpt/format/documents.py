"""The zarr documents of a checkpoint, byte for byte: a pure function of the index. [UCF-10..19]

`verify` compares files with these bytes, so every byte is decided here: canonical JSON, members in the order below.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from elastickpt.format.arrays import DType
from elastickpt.format.canonical_json import dump
from elastickpt.format.encode_values import encode_value, pointer_token
from elastickpt.format.keys import components, document_file
from elastickpt.format.records import ArrayRecord, IndexPart
from elastickpt.format.version import CONSOLIDATED_ARRAYS, MAX_MANIFEST_NBYTES


def codecs_of(dtype: DType) -> list[object]:
    """The codecs of an array: its bytes as they are, little-endian; one-byte elements have no byte order. [UCF-13]"""
    if dtype.itemsize == 1:
        return [{"name": "bytes"}]
    return [{"name": "bytes", "configuration": {"endian": "little"}}]


def dimension_names(shape: tuple[int, ...]) -> tuple[str, ...]:
    """One name an axis, equal names for equal sizes in all arrays: (8, 4, 8) -> ("n8", "n4", "n8_2"). [UCF-15]"""
    seen: dict[int, int] = {}
    names = []
    for extent in shape:
        seen[extent] = seen.get(extent, 0) + 1
        names.append(f"n{extent}" if seen[extent] == 1 else f"n{extent}_{seen[extent]}")
    return tuple(names)


def _fill(dtype: DType) -> object:
    return list(dtype.fill_value) if isinstance(dtype.fill_value, tuple) else dtype.fill_value


@lru_cache(maxsize=4096)
def _around(shape: tuple[int, ...], dtype: DType, chunk_shape: tuple[int, ...]) -> tuple[str, str]:
    """The text of an array document before and after its own attributes; arrays of one shape share it."""
    before = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _fill(dtype),
        "codecs": codecs_of(dtype),
    }
    after = {"dimension_names": list(dimension_names(shape))}
    return f'{dump(before)[:-1]},"attributes":{{"elastickpt":', f"}},{dump(after)[1:]}"


def _array_text(record: ArrayRecord) -> str:
    spec = record.spec
    own: dict[str, object] = {"item": spec.id.item, "name": spec.id.name, "state": spec.id.state}
    for name, value in record.attributes:
        own[name] = encode_value(value, where=f"{record.key}/{name}")
    before, after = _around(spec.shape, spec.type, record.chunk_shape)
    return f"{before}{dump(own)}{after}"


def _group_text(names: tuple[str, ...]) -> str:
    section, below = names[0], names[1:]
    own: dict[str, object] = {"section": section}
    if below:
        own["item"] = below[0]
    if len(below) > 1:
        own["name"] = below[1] if section == "params" else "/".join(map(pointer_token, below[1:]))
    return dump({"zarr_format": 3, "node_type": "group", "attributes": {"elastickpt": own}})


def array_document(record: ArrayRecord) -> bytes:
    """The `zarr.json` of an array. [UCF-12]"""
    return _array_text(record).encode("ascii")


def group_document(names: tuple[str, ...]) -> bytes:
    """The `zarr.json` of a group below the root, by section and true names. [UCF-16]

    `("params",)`, `("params", "model")`, `("params", "model", "layers.0.w")`, `("extra", "loader", "state", "0")`.
    """
    return _group_text(names).encode("ascii")


def _nodes(arrays: Iterable[ArrayRecord]) -> Iterator[tuple[str, str]]:
    """(path, document) of every node below the root: each group before what stands in it, arrays in their order."""
    seen: set[str] = set()
    for record in arrays:
        array = record.spec.id
        names, parts = (array.section, *components(array)), record.key.split("/")
        for depth in range(1, len(names)):
            key = "/".join(parts[:depth])
            if key not in seen:
                seen.add(key)
                yield key, _group_text(names[:depth])
        yield record.key, _array_text(record)


def _root_text(nodes: dict[str, str]) -> str:
    """With consolidated metadata if there are nodes to consolidate and the text stays within the limit. [UCF-17]"""
    plain = '{"zarr_format":3,"node_type":"group","attributes":{}'
    inline = ",".join(f"{dump(key)}:{text}" for key, text in sorted(nodes.items()))
    full = f'{plain},"consolidated_metadata":{{"kind":"inline","must_understand":false,"metadata":{{{inline}}}}}}}'
    return full if nodes and len(full) <= MAX_MANIFEST_NBYTES else f"{plain}}}"


def _consolidates(arrays: Sequence[ArrayRecord]) -> bool:
    return len(arrays) <= CONSOLIDATED_ARRAYS and all(record.spec.type.support == "core" for record in arrays)


def root_document(arrays: Iterable[ArrayRecord]) -> bytes:
    """The root's `zarr.json`: with consolidated metadata when all arrays are of core element types, at most 20,000, and
    the document stays within 64 MiB. [UCF-17]
    """
    listed = tuple(arrays)
    return _root_text(dict(_nodes(listed)) if _consolidates(listed) else {}).encode("ascii")


def documents(parts: Iterable[IndexPart]) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of every `zarr.json` of a plain tree: each group before what stands in it, the root last. [UCF-10]

    Lazy beyond the records themselves; about 20 µs an array.
    """
    arrays = tuple(record for part in parts for record in part.arrays)
    kept: dict[str, str] = {}
    consolidates = _consolidates(arrays)
    for key, text in _nodes(arrays):
        if consolidates:
            kept[key] = text
        yield document_file(key), text.encode("ascii")
    yield document_file(""), _root_text(kept).encode("ascii")


def upper_documents(arrays: Iterable[ArrayRecord]) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the group documents above parameters: sections, items, extra levels, and last the root. [UCF-10]

    In a save these are the committer's; writers make those of parameters and arrays.
    """
    listed = tuple(arrays)
    seen: set[str] = set()
    for record in listed:
        array = record.spec.id
        names, parts = (array.section, *components(array)), record.key.split("/")
        for depth in range(1, min(len(names), 3) if array.section == "params" else len(names)):
            key = "/".join(parts[:depth])
            if key not in seen:
                seen.add(key)
                yield document_file(key), group_document(names[:depth])
    yield document_file(""), root_document(listed)
