"""The zarr documents of a checkpoint, byte for byte: a pure function of the index. [UCF-10..19]

`verify` compares files with these bytes, so every byte is decided here: canonical JSON, members in the order below.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from elastickpt.format.arrays import ArrayId
from elastickpt.format.canonical_json import dump
from elastickpt.format.dtypes import DTYPES, DType
from elastickpt.format.encode_values import encode_value, pointer_token
from elastickpt.format.keys import components, document_file
from elastickpt.format.limits import CONSOLIDATED_ARRAYS, MAX_MANIFEST_NBYTES
from elastickpt.format.records import ArrayRecord, IndexPart

_Json = dict[str, object]


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


def _array(record: ArrayRecord) -> _Json:
    spec = record.spec
    own: _Json = {"item": spec.id.item, "name": spec.id.name, "state": spec.id.state}
    for name, value in record.attributes:
        own[name] = encode_value(value, where=f"{record.key}/{name}")
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(spec.shape),
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(record.chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _fill(spec.type),
        "codecs": codecs_of(spec.type),
        "attributes": {"elastickpt": own},
        "dimension_names": list(dimension_names(spec.shape)),
    }


def _group(own: _Json) -> _Json:
    return {"zarr_format": 3, "node_type": "group", "attributes": {"elastickpt": own} if own else {}}


def _bytes(document: _Json) -> bytes:
    return dump(document).encode("ascii")


def array_document(record: ArrayRecord) -> bytes:
    """The `zarr.json` of an array. [UCF-12]"""
    return _bytes(_array(record))


def group_document(names: tuple[str, ...]) -> bytes:
    """The `zarr.json` of a group below the root, by section and true names: ("params",), ("params", "m", "layers.0.w").

    [UCF-16]
    """
    return _bytes(_group(_group_attributes(names)))


def _group_attributes(names: tuple[str, ...]) -> _Json:
    section, below = names[0], names[1:]
    own: _Json = {"item": below[0]} if below else {}
    if len(below) > 1:
        own["name"] = below[1] if section == "params" else "/".join(map(pointer_token, below[1:]))
    return own


def _nodes(arrays: Iterable[ArrayRecord]) -> dict[str, _Json]:
    """path -> document of every node below the root, sorted by path."""
    nodes: dict[str, _Json] = {}
    for record in arrays:
        for key, names in _groups_above(record.spec.id, record.key):
            if key not in nodes:
                nodes[key] = _group(_group_attributes(names))
        nodes[record.key] = _array(record)
    return dict(sorted(nodes.items()))


def _groups_above(array: ArrayId, key: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    names, parts = (array.section, *components(array)), key.split("/")
    for depth in range(1, len(names)):
        yield "/".join(parts[:depth]), names[:depth]


def _root(nodes: dict[str, _Json]) -> bytes:
    arrays = [node for node in nodes.values() if node["node_type"] == "array"]
    plain = _group({})
    if len(arrays) > CONSOLIDATED_ARRAYS or not all(_is_core(node) for node in arrays):
        return _bytes(plain)
    inline = {"kind": "inline", "must_understand": False, "metadata": nodes}
    data = _bytes({**plain, "consolidated_metadata": inline})
    return data if len(data) <= MAX_MANIFEST_NBYTES else _bytes(plain)


def _is_core(node: _Json) -> bool:
    return DTYPES[str(node["data_type"])].support == "core"


def root_document(arrays: Iterable[ArrayRecord]) -> bytes:
    """The root's `zarr.json`, with consolidated metadata when all arrays are of core element types, at most 20,000,
    and the document stays within 64 MiB. [UCF-17]
    """
    return _root(_nodes(arrays))


def documents(parts: Iterable[IndexPart]) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of every `zarr.json` of a plain tree, sorted by path, the root's last. [UCF-10]"""
    nodes = _nodes(record for part in parts for record in part.arrays)
    for key, node in nodes.items():
        yield document_file(key), _bytes(node)
    yield document_file(""), _root(nodes)


def upper_documents(arrays: Iterable[ArrayRecord]) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the group documents above parameters: sections, items, extra levels, and last the root. [UCF-10]

    In a save these are the committer's; writers make those of parameters and arrays.
    """
    records = tuple(arrays)
    groups: dict[str, tuple[str, ...]] = {}
    for record in records:
        for key, names in _groups_above(record.spec.id, record.key):
            if not (names[0] == "params" and len(names) == 3):
                groups[key] = names
    for key, names in sorted(groups.items()):
        yield document_file(key), group_document(names)
    yield document_file(""), root_document(records)
