"""What all generators share: a vector, and records as plain Python values that become bytes."""

from __future__ import annotations

import base64
import copy
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import xxhash

Json = Any  # a value that `json` writes
Record = dict[str, Any]
Change = Callable[[Record], object]


@dataclass(frozen=True)
class Vector:
    """One fact: what a reader makes of `input`, or the kind of error with which it refuses it."""

    suite: str  # the folder, "manifests/invalid"
    name: str
    about: str
    requires: tuple[str, ...]
    input: Json
    expect: Json = None
    error: str | None = None
    note: str | None = None

    @property
    def path(self) -> str:
        return f"{self.suite}/{self.name}.json"

    def text(self) -> str:
        body: Record = {"about": self.about, "requires": list(self.requires), "input": self.input}
        if self.error is None:
            body["expect"] = self.expect
        else:
            body["error"] = self.error
        if self.note:
            body["note"] = self.note
        return json.dumps(body, indent=1) + "\n"


def canonical(value: Json) -> str:
    return json.dumps(value, separators=(",", ":"))


def column(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def unsigned(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def digest(data: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))


def checksum(data: bytes) -> int:
    return int(xxhash.xxh3_64_intdigest(data))


def name_hash(name: str) -> str:
    return str(xxhash.xxh3_64_hexdigest(name.encode()))


def packed(record: Json) -> bytes:
    return bytes(msgpack.packb(record))


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def sealed(body: str) -> str:
    """A manifest's text from its object without the digest."""
    opened = body[:-1]
    return f'{opened},"digest":"{digest(opened.encode())}"}}\n'


def changed(record: Record, change: Change) -> Record:
    """A deep copy after `change`; what `change` returns is ignored."""
    other = copy.deepcopy(record)
    change(other)
    return other


def setting(*path: str | int, to: Json) -> Change:
    """The change that puts a value at a place: `setting("files", "path", 0, to="/etc/passwd")`."""

    def change(record: Record) -> None:
        place: Any = record
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return change


def without(*path: str | int) -> Change:
    def change(record: Record) -> None:
        place: Any = record
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    return change


ZEROS = "0" * 32


def manifest() -> Record:
    """A manifest of two writers over one array, without its digest."""
    return {
        "format": "elastickpt",
        "version": 1,
        "requires": [],
        "attempt": "3f1c",
        "step": 100,
        "time": 1763700000.5,
        "world_size": 2,
        "placement": "plain",
        "versions": {"elastickpt": "0.1.0", "torch": "2.13.0"},
        "items": [{"name": "model", "kind": "module", "type": "Net"}],
        "meshes": [{"name": "world", "axes": ["dp"], "sizes": [2], "ranks": [[0, 1]]}],
        "layouts": [{"mesh": 0, "placements": ["S(0)"]}],
        "layout_text": None,
        "bases": [],
        "index": [
            {
                "path": "index.msgpack",
                "nbytes": 812,
                "digest": ZEROS,
                "first": "params/model/w/value",
                "last": "params/model/w/value",
            }
        ],
        "fragments": [
            {"path": "fragments/00000.msgpack", "nbytes": 930, "digest": ZEROS},
            {"path": "fragments/00001.msgpack", "nbytes": 930, "digest": ZEROS},
        ],
        "tied": [],
        "values": {"/scheduler": {"last_epoch": 100}},
    }


CODECS = canonical([{"name": "bytes", "configuration": {"endian": "little"}}])
BYTE_CODECS = canonical([{"name": "bytes"}])


def index() -> Record:
    """An index part: a parameter of shape [10, 6] with value and exp_avg by writers 0 and 1, and an extra of [3]."""
    return {
        "format": "elastickpt-index",
        "version": 1,
        "templates": [
            template("int64", [3], layout=None),
            template("float32", [10, 6], layout=0),
        ],
        "entries": {
            "section": column([1, 0]),
            "item": column([0, 1]),
            "items": ["loader", "model"],
            "name": ["", "w"],
            "key": ["extra/loader", "params/model/w"],
        },
        "leaves": [["", ""], ["exp_avg", "exp_avg"], ["value", "value"]],
        "writer_sets": [[[0, 0]], [[0, 1]]],
        "arrays": {
            "entry": column([0, 1, 1]),
            "leaf": column([0, 1, 2]),
            "template": column([0, 1, 1]),
            "writers": column([0, 1, 1]),
            "shape": column([3, 10, 6, 10, 6]),
        },
        "tables": [table()],
    }


def template(data_type: str, chunk_shape: Sequence[int], *, layout: int | None, attributes: str = "{}") -> Record:
    codecs = BYTE_CODECS if data_type in ("bool", "int8", "uint8") or "float8" in data_type else CODECS
    return {
        "data_type": data_type,
        "chunk_shape": list(chunk_shape),
        "codecs": codecs,
        "layout": layout,
        "attributes": attributes,
    }


def table() -> Record:
    """An optimizer's table over two parameters, of which the second has no `step`."""
    return {
        "item": "optimizer",
        "models": ["model"],
        "model": column([0, 0]),
        "names": ["v", "w"],
        "fields": [
            {"kind": "hyper", "key": "lr", "values": "[0.001]", "which": column([0, 0])},
            {"kind": "scalar", "key": "step", "values": "[100]", "which": column([0, -1])},
        ],
    }


def fragments() -> Record:
    """Writer 0's map: rows 0 to 4 of a [10, 6] float32 array, and columns 0 to 2 of another one as strided rows."""
    return {
        "format": "elastickpt-fragments",
        "version": 1,
        "writer": 0,
        "attempt": "3f1c",
        "block_nbytes": 65536,
        "arrays": ["params/model/v/value", "params/model/w/value"],
        "ndims": column([2, 2]),
        "files": {
            "base": column([0, 0]),
            "path": ["params/model/v/value/c.0.0", "params/model/w/value/c.0.0"],
            "nbytes": column([240, 240]),
        },
        "pieces": {
            "array": column([0, 1]),
            "file": column([0, 1]),
            "offset": column([0, 0]),
            "nbytes": column([120, 120]),
            "row_nbytes": column([120, 12]),
            "row_stride": column([120, 24]),
            "start": column([0, 0, 0, 0]),
            "shape": column([5, 6, 10, 3]),
        },
        "checksums": unsigned([1, 2**64 - 1]),
        "tables": [],
        "values": canonical({"/rng": {"$bytes": "AAEC"}}),
    }
