"""Vectors of whole checkpoints: a JSON map from path to base64. Faults come before the digests, flips after them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from tools.vector_kit.geometry import array_document
from tools.vector_kit.kit import (
    Json,
    Record,
    Vector,
    as_base64,
    canonical,
    checksum,
    column,
    digest,
    manifest,
    packed,
    sealed,
    template,
    unsigned,
)

W = "params/model/w/value"
V = "params/model/v/value"

_FILL: dict[str, Json] = {"float32": "NaN", "int64": -(2**63), "uint8": 255, "float64": "NaN", "bfloat16": "NaN"}


@dataclass
class Array:
    """An array in one row of chunks along its first axis."""

    key: str
    id: tuple[str, str, str, str]
    dtype: str
    shape: list[int]
    chunk: list[int]
    writers: list[int]
    data: bytes
    layout: int | None = None


@dataclass
class Piece:
    key: str
    file: str
    start: list[int]
    shape: list[int]
    offset: int
    nbytes: int
    row_nbytes: int
    row_stride: int
    base: int = 0
    checksums: list[int] | None = None  # None: those of the bytes in the file

    def of(self, data: bytes) -> bytes:
        rows = range(self.nbytes // self.row_nbytes)
        starts = [self.offset + row * self.row_stride for row in rows]
        return b"".join(data[start : start + self.row_nbytes] for start in starts)


@dataclass
class Parts:
    """A checkpoint before it is sealed. `files` are those that pieces lie in; `lengths` what the maps say of them."""

    arrays: list[Array]
    pieces: list[list[Piece]]  # by writer
    files: dict[str, bytes]
    manifest: Record = field(default_factory=manifest)
    maps: list[Record] = field(default_factory=list)
    index: Record = field(default_factory=dict)
    documents: bool = True
    lengths: dict[str, int] = field(default_factory=dict)
    based: dict[str, bytes] = field(default_factory=dict)  # files of base 1 that pieces lie in
    second: int | None = None  # the place of the first array of a second index part


def base() -> Parts:
    """Four arrays and two writers: rows, columns, an array with a pad, and one without axes."""
    w = struct.pack("<60f", *range(60))
    v = struct.pack("<16q", *range(16))
    model = ("params", "model")
    arrays = [
        Array("extra/t", ("extra", "t", "", ""), "uint8", [3], [2], [0], bytes([7, 8, 9])),
        Array("params/model/s/value", (*model, "s", "value"), "float64", [], [], [1], struct.pack("<d", -0.0)),
        Array("params/model/v/value", (*model, "v", "value"), "int64", [4, 4], [4, 4], [0, 1], v),
        Array("params/model/w/value", (*model, "w", "value"), "float32", [10, 6], [10, 6], [0, 1], w, layout=0),
    ]
    files = {
        "extra/t/c.0": bytes([7, 8]),
        "extra/t/c.1": bytes([9, 0]),
        "params/model/s/value/c": struct.pack("<d", -0.0),
        "params/model/v/value/c.0.0": v,
        "params/model/w/value/c.0.0": w,
    }
    pieces = [
        [
            Piece("extra/t", "extra/t/c.0", [0], [2], 0, 2, 2, 2),
            Piece("extra/t", "extra/t/c.1", [2], [1], 0, 1, 1, 1),
            Piece("params/model/v/value", "params/model/v/value/c.0.0", [0, 0], [4, 2], 0, 64, 16, 32),
            Piece("params/model/w/value", "params/model/w/value/c.0.0", [0, 0], [5, 6], 0, 120, 120, 120),
        ],
        [
            Piece("params/model/s/value", "params/model/s/value/c", [], [], 0, 8, 8, 8),
            Piece("params/model/v/value", "params/model/v/value/c.0.0", [0, 2], [4, 2], 16, 64, 16, 32),
            Piece("params/model/w/value", "params/model/w/value/c.0.0", [5, 0], [5, 6], 120, 120, 120, 120),
        ],
    ]
    return Parts(arrays, pieces, files)


def _map(parts: Parts, writer: int) -> Record:
    pieces = parts.pieces[writer]
    keys = sorted({piece.key for piece in pieces})
    files = list(dict.fromkeys((piece.base, piece.file) for piece in pieces))
    ndim = {piece.key: len(piece.start) for piece in pieces}
    held = {**parts.files, **parts.based}
    lengths = {path: parts.lengths.get(path, len(data)) for path, data in held.items()}
    sums = [piece.checksums if piece.checksums is not None else [checksum(piece.of(held[piece.file]))] for piece in pieces]
    return {
        "format": "elastickpt-fragments",
        "version": 1,
        "writer": writer,
        "attempt": "3f1c",
        "block_nbytes": 65536,
        "arrays": keys,
        "ndims": column([ndim[key] for key in keys]),
        "files": {
            "base": column([number for number, _ in files]),
            "path": [path for _, path in files],
            "nbytes": column([lengths[path] for _, path in files]),
        },
        "pieces": {
            "array": column([keys.index(piece.key) for piece in pieces]),
            "file": column([files.index((piece.base, piece.file)) for piece in pieces]),
            "offset": column([piece.offset for piece in pieces]),
            "nbytes": column([piece.nbytes for piece in pieces]),
            "row_nbytes": column([piece.row_nbytes for piece in pieces]),
            "row_stride": column([piece.row_stride for piece in pieces]),
            "start": column([low for piece in pieces for low in piece.start]),
            "shape": column([extent for piece in pieces for extent in piece.shape]),
        },
        "checksums": unsigned([one for of_piece in sums for one in of_piece]),
        "tables": [],
        "values": canonical({"/rng": {"$bytes": as_base64(bytes([writer]))}}),
    }


def _index(arrays: list[Array]) -> Record:
    leaf = [["", ""] if array.id[0] == "extra" else [array.id[3], array.key.rpartition("/")[2]] for array in arrays]
    stems = [array.key if array.id[0] == "extra" else array.key.rpartition("/")[0] for array in arrays]
    order = list(range(len(arrays)))
    return {
        "format": "elastickpt-index",
        "version": 1,
        "templates": [template(array.dtype, array.chunk, layout=array.layout) for array in arrays],
        "entries": {
            "section": column([int(array.id[0] == "extra") for array in arrays]),
            "item": column(order),
            "items": [array.id[1] for array in arrays],
            "name": [array.id[2] for array in arrays],
            "key": stems,
        },
        "leaves": leaf,
        "writer_sets": [[[array.writers[0], array.writers[-1]]] if array.writers else [] for array in arrays],
        "arrays": {
            **{name: column(order) for name in ("entry", "leaf", "template", "writers")},
            "shape": column([extent for array in arrays for extent in array.shape]),
        },
        "tables": [],
    }


def documents(arrays: list[Array]) -> dict[str, bytes]:
    nodes: dict[str, str] = {}
    for array in arrays:
        parts = array.key.split("/")
        section, item, name, _ = array.id
        own: Record = {"section": section}
        for depth in range(1, len(parts)):
            if depth == 2:
                own = {**own, "item": item}
            if depth == 3:
                own = {**own, "name": name}
            group = {"zarr_format": 3, "node_type": "group", "attributes": {"elastickpt": own}}
            nodes["/".join(parts[:depth])] = canonical(group)
        nodes[array.key] = array_document(array.id, array.shape, array.dtype, array.chunk, _FILL[array.dtype], {})
    root: Record = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    if arrays and all(array.dtype != "bfloat16" for array in arrays):
        metadata = {key: json.loads(nodes[key]) for key in sorted(nodes)}
        root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": metadata}
    found = {f"{key}/zarr.json": text.encode() for key, text in nodes.items()}
    return {**found, "zarr.json": canonical(root).encode()}


Edit = Callable[[Parts], object]
Later = Callable[[dict[str, bytes]], object]


def _nothing(value: object) -> None:
    del value


def build(edit: Edit = _nothing, *, records: Edit = _nothing, later: Later = _nothing) -> dict[str, bytes]:
    """The files: `edit` changes arrays and pieces, `records` the finished records, `later` the sealed files."""
    parts = base()
    edit(parts)
    parts.maps = [_map(parts, writer) for writer in range(len(parts.pieces))]
    indexes = [_index(parts.arrays[: parts.second])]
    _describe(parts.manifest["index"][0], parts.arrays[: parts.second])
    if parts.second is not None:
        indexes.append(_index(parts.arrays[parts.second :]))
        parts.manifest["index"].append({"path": "index-00001.msgpack"})
        _describe(parts.manifest["index"][1], parts.arrays[parts.second :])
    parts.index = indexes[0]
    parts.manifest["fragments"] = [{"path": f"fragments/{k:05d}.msgpack"} for k in range(len(parts.maps))]
    records(parts)
    files = dict(parts.files)
    if parts.documents:
        files.update(documents(parts.arrays))
    sealed_records = list(zip(parts.manifest["index"], indexes, strict=True))
    sealed_records += list(zip(parts.manifest["fragments"], parts.maps, strict=True))
    for entry, record in sealed_records:
        data = packed(record)
        files[entry["path"]] = data
        entry.update(nbytes=len(data), digest=digest(data))
    members = ("path", "nbytes", "digest", "first", "last")
    parts.manifest["index"] = [{name: entry[name] for name in members} for entry in parts.manifest["index"]]
    files["checkpoint.json"] = sealed(canonical(parts.manifest)).encode()
    later(files)
    return files


def _describe(entry: Record, arrays: list[Array]) -> None:
    entry.update(first=arrays[0].key if arrays else "", last=arrays[-1].key if arrays else "")


def piece(writer: int, number: int, **changes: Json) -> Edit:
    """The edit that changes members of one piece."""

    def edit(parts: Parts) -> None:
        for name, value in changes.items():
            setattr(parts.pieces[writer][number], name, value)

    return edit


def only(*keys: str) -> Edit:
    """The edit that leaves these arrays."""

    def edit(parts: Parts) -> None:
        parts.arrays = [array for array in parts.arrays if array.key in keys]
        parts.pieces = [[one for one in pieces if one.key in keys] for pieces in parts.pieces]
        parts.files = {path: data for path, data in parts.files.items() if path.startswith(keys)}

    return edit


def flip(path: str, at: int = 0) -> Later:
    def later(files: dict[str, bytes]) -> None:
        data = bytearray(files[path])
        data[at] ^= 1
        files[path] = bytes(data)

    return later


def _expect(parts: Parts) -> Json:
    return {
        "arrays": {array.key: {"dtype": array.dtype, "shape": array.shape, "hex": array.data.hex()} for array in parts.arrays}
    }


def vector(suite: str, name: str, about: str, rule: str, files: dict[str, bytes], **outcome: Json) -> Vector:
    """A path that begins with `../` is a file of a checkpoint beside, one that ends with `/` an empty folder."""
    encoded: Record = {"files": {path: as_base64(files[path]) for path in sorted(files) if not path.startswith("../")}}
    beside: dict[str, dict[str, str]] = {}
    for path in sorted(path for path in files if path.startswith("../")):
        name_beside, _, below = path.removeprefix("../").partition("/")
        beside.setdefault(name_beside, {})[below] = as_base64(files[path])
    if beside:
        encoded["beside"] = beside
    return Vector(f"checkpoints/{suite}", name, about, tuple(rule.split()), encoded, **outcome)


def valid(name: str, about: str, rule: str, edit: Edit = _nothing, later: Later = _nothing) -> Vector:
    parts = base()
    edit(parts)
    return vector("valid", name, about, rule, build(edit, later=later), expect=_expect(parts))
