"""Vectors of fragment files and index parts."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tools.vector_kit.kit import (
    Change,
    Json,
    Record,
    Vector,
    as_base64,
    changed,
    column,
    fragments,
    index,
    packed,
    setting,
    table,
    template,
    unsigned,
)

_Invalid = tuple[tuple[str, str, str, str, Change], ...]

_FRAGMENTS_VALID: tuple[tuple[str, str, str, Change], ...] = (
    ("two-pieces", "A contiguous piece and a strided one.", "FRAG-14 FRAG-20 UCF-41", lambda m: None),
    ("no-values", "Nothing per rank.", "UCF-58", setting("values", to=None)),
    ("tables", "An optimizer's table.", "UCF-60", setting("tables", to=[table()])),
    (
        "small-blocks",
        "16,385 bytes of a pack in blocks of 16,384: two checksums.",
        "FRAG-17 FRAG-67",
        lambda m: m.update(
            block_nbytes=16384,
            arrays=["params/model/b/value"],
            ndims=column([1]),
            files={"base": column([0]), "path": ["packs/3f1c-00000.bin"], "nbytes": column([20480])},
            pieces={
                **{name: column([0]) for name in ("array", "file", "offset")},
                **{name: column([16385]) for name in ("nbytes", "row_nbytes", "row_stride")},
                "start": column([0]),
                "shape": column([16385]),
            },
            checksums=unsigned([1, 2]),
        ),
    ),
    ("file-in-base", "A piece in another checkpoint.", "FRAG-23", setting("files", "base", to=column([0, 1]))),
    (
        "no-pieces",
        "A rank whose shards are all empty still attests.",
        "FRAG-12",
        lambda m: m.update(
            arrays=[],
            ndims=b"",
            files={"base": b"", "path": [], "nbytes": b""},
            pieces=dict.fromkeys(m["pieces"], b""),
            checksums=b"",
        ),
    ),
    (
        "no-axes",
        "An array without axes has one element.",
        "FRAG-2",
        lambda m: m.update(
            arrays=["params/model/s/value"],
            ndims=column([0]),
            files={"base": column([0]), "path": ["params/model/s/value/c"], "nbytes": column([4])},
            pieces={
                **{name: column([0]) for name in ("array", "file", "offset")},
                **{name: column([4]) for name in ("nbytes", "row_nbytes", "row_stride")},
                "start": b"",
                "shape": b"",
            },
            checksums=unsigned([7]),
        ),
    ),
    (
        "three-blocks",
        "131,073 bytes in blocks of 65,536: three checksums.",
        "FRAG-17",
        lambda m: m.update(
            arrays=["params/model/b/value"],
            ndims=column([1]),
            files={"base": column([0]), "path": ["params/model/b/value/c.0"], "nbytes": column([131073])},
            pieces={
                **{name: column([0]) for name in ("array", "file", "offset")},
                **{name: column([131073]) for name in ("nbytes", "row_nbytes", "row_stride")},
                "start": column([0]),
                "shape": column([131073]),
            },
            checksums=unsigned([1, 2, 3]),
        ),
    ),
)

_FRAGMENTS_INVALID: _Invalid = (
    ("version-2", "A later version.", "UCF-72", "unsupported", setting("version", to=2)),
    ("other-format", "An index in its place.", "UCF-44", "malformed", setting("format", to="elastickpt-index")),
    ("member-missing", "No attempt.", "FRAG-20 UCF-44", "malformed", lambda m: m.pop("attempt")),
    ("member-nil", "What is nil is not left out.", "FRAG-20 UCF-44", "malformed", lambda m: m.pop("values")),
    ("member-unknown", "One member more.", "FRAG-20 UCF-44", "malformed", setting("extra", to=1)),
    ("member-renamed", "One under another name.", "FRAG-20", "malformed", lambda m: m.update(sums=m.pop("checksums"))),
    ("member-missing-inside", "A column less.", "FRAG-20", "malformed", lambda m: m["pieces"].pop("row_stride")),
    ("member-unknown-inside", "One column more.", "FRAG-20 UCF-44", "malformed", setting("pieces", "extra", to=b"")),
    ("writer-true", "True is no number.", "UCF-44", "malformed", setting("writer", to=True)),
    ("writer-text", "Text is no number.", "UCF-44", "malformed", setting("writer", to="0")),
    ("writer-huge", "Writer 2^20.", "UCF-96", "limit-exceeded", setting("writer", to=2**20)),
    ("block-odd", "No power of two.", "FRAG-22", "malformed", setting("block_nbytes", to=65537)),
    ("block-small", "32 KiB, and no pack.", "FRAG-22 FRAG-67", "malformed", setting("block_nbytes", to=32768)),
    (
        "block-of-pack",
        "8 KiB, of a pack.",
        "FRAG-67",
        "malformed",
        lambda m: m.update(block_nbytes=8192, files={**m["files"], "path": ["packs/3f1c-00000.bin", "packs/3f1c-00001.bin"]}),
    ),
    ("block-large", "2 MiB.", "FRAG-22", "malformed", setting("block_nbytes", to=2**21)),
    ("column-cut", "A column of 15 bytes.", "UCF-46", "malformed", lambda m: m["pieces"].update(offset=bytes(15))),
    ("column-short", "One entry for two pieces.", "UCF-46", "malformed", setting("pieces", "offset", to=column([0]))),
    ("column-text", "Text instead of bytes.", "UCF-44", "malformed", setting("pieces", "offset", to="0" * 16)),
    ("array-beyond", "A third array of two.", "UCF-46", "malformed", setting("pieces", "array", to=column([0, 2]))),
    ("file-beyond", "A third file of two.", "UCF-46", "malformed", setting("pieces", "file", to=column([0, 2]))),
    ("array-order", "The second array first.", "FRAG-11", "malformed", setting("pieces", "array", to=column([1, 0]))),
    ("rows-partial", "Half a row.", "FRAG-12", "malformed", setting("pieces", "row_nbytes", to=column([120, 16]))),
    (
        "nbytes-zero",
        "A piece without bytes.",
        "FRAG-12",
        "malformed",
        lambda m: (m["pieces"].update(nbytes=column([120, 0])), m.update(checksums=unsigned([1]))),
    ),
    (
        "stride-short",
        "Rows on each other.",
        "FRAG-13",
        "malformed",
        setting("pieces", "row_stride", to=column([120, 8])),
    ),
    (
        "stride-one-row",
        "One row, own stride.",
        "FRAG-14",
        "malformed",
        setting("pieces", "row_stride", to=column([121, 24])),
    ),
    (
        "rows-joined",
        "Rows without a gap.",
        "FRAG-27",
        "malformed",
        setting("pieces", "row_stride", to=column([120, 12])),
    ),
    ("beyond-file", "A row past the end.", "FRAG-15", "malformed", setting("pieces", "offset", to=column([0, 13]))),
    (
        "beyond-file-row",
        "One row past the end.",
        "FRAG-15",
        "malformed",
        setting("pieces", "offset", to=column([121, 0])),
    ),
    ("offset-negative", "Before the file.", "UCF-46", "malformed", setting("pieces", "offset", to=column([-1, 0]))),
    (
        "offset-wraps",
        "Offset and length that wrap around 2^64.",
        "UCF-46",
        "malformed",
        setting("pieces", "offset", to=column([2**63 - 1, 0])),
    ),
    (
        "extent-zero",
        "A piece without rows.",
        "FRAG-16",
        "malformed",
        setting("pieces", "shape", to=column([0, 6, 10, 3])),
    ),
    (
        "start-negative",
        "Before the array.",
        "UCF-46",
        "malformed",
        setting("pieces", "start", to=column([-1, 0, 0, 0])),
    ),
    ("stop-huge", "Past 2^48.", "FRAG-16", "malformed", setting("pieces", "start", to=column([2**48, 0, 0, 0]))),
    ("axis-missing", "Three axes for four.", "UCF-46", "malformed", setting("pieces", "start", to=column([0, 0, 0]))),
    ("checksum-missing", "One for two pieces.", "FRAG-17", "malformed", setting("checksums", to=unsigned([1]))),
    ("checksum-extra", "Three for two pieces.", "FRAG-17", "malformed", setting("checksums", to=unsigned([1, 2, 3]))),
    ("arrays-order", "Keys fall.", "FRAG-24", "malformed", lambda m: m["arrays"].reverse()),
    ("arrays-twice", "One key twice.", "FRAG-24", "malformed", setting("arrays", to=["params/model/v/value"] * 2)),
    ("array-idle", "An array without a piece.", "FRAG-28", "malformed", setting("pieces", "array", to=column([0, 0]))),
    ("ndim-33", "33 axes.", "UCF-93", "limit-exceeded", setting("ndims", to=column([2, 33]))),
    ("file-twice", "One file twice.", "FRAG-23", "malformed", lambda m: m["files"].update(path=["a/c"] * 2)),
    ("path-parent", "Out of the tree.", "UCF-38", "unsafe", setting("files", "path", 0, to="../../etc/passwd")),
    ("path-absolute", "Absolute.", "UCF-38", "unsafe", setting("files", "path", 0, to="/etc/passwd")),
    ("array-parent", "A key out of the tree.", "UCF-38", "unsafe", setting("arrays", 0, to="params/../x")),
    ("values-not-json", "Values that are no JSON.", "UCF-43", "malformed", setting("values", to="{")),
    ("values-pointer", "No pointer.", "UCF-58", "malformed", setting("values", to='{"rng":1}')),
    ("table-which", "A second value of one.", "UCF-46", "malformed", lambda m: _table(m, "which", column([1, 0]))),
    ("table-which-low", "-2 is not absent.", "UCF-46", "malformed", lambda m: _table(m, "which", column([-2, 0]))),
    ("table-kind", "No such kind.", "UCF-60", "malformed", lambda m: _table(m, "kind", "group")),
    ("table-values", "Values that are no list.", "UCF-60", "malformed", lambda m: _table(m, "values", "{}")),
    ("table-twice", "Two tables of one.", "UCF-61", "malformed", lambda m: m.update(tables=[table(), table()])),
    (
        "parameter-twice",
        "One parameter twice.",
        "UCF-61",
        "malformed",
        lambda m: m.update(tables=[{**table(), "names": ["w", "w"]}]),
    ),
    ("field-twice", "One field twice.", "UCF-61", "malformed", lambda m: m.update(tables=[_doubled(table())])),
)


def _table(record: Record, name: str, value: Json) -> None:
    one = table()
    one["fields"][0][name] = value
    record["tables"] = [one]


def _doubled(one: Record) -> Record:
    one["fields"] = [one["fields"][0]] * 2
    return one


def _raw(record: Record) -> Iterator[tuple[str, str, str, str, bytes]]:
    whole = packed(record)
    yield "cut", "The last byte is missing.", "UCF-45", "malformed", whole[:-1]
    yield "empty", "No byte.", "UCF-45", "malformed", b""
    yield "trailing", "A byte too many.", "UCF-45", "malformed", whole + b"\xc0"
    yield "list", "A list instead of a map.", "UCF-45", "malformed", packed([record])
    yield "number-key", "A key that is no text.", "UCF-45", "malformed", packed({**record, 1: 2})
    yield (
        "extension",
        "An extension type.",
        "UCF-45",
        "malformed",
        whole.replace(packed("version") + b"\x01", packed("version") + b"\xd4\x05\x01"),
    )
    yield (
        "timestamp",
        "msgpack's own time.",
        "UCF-45",
        "malformed",
        whole.replace(packed("version") + b"\x01", packed("version") + b"\xd6\xff\0\0\0\0"),
    )
    yield (
        "bad-text",
        "A key with a byte that is no UTF-8.",
        "UCF-45",
        "malformed",
        whole.replace(b"format", b"forma\xff", 1),
    )
    twice = bytes([whole[0] + 1]) + packed("version") + b"\x01" + whole[1:]
    yield "member-twice", "One member twice.", "UCF-44", "malformed", twice
    yield (
        "deep",
        "Lists 5,000 deep.",
        "UCF-92",
        "limit-exceeded",
        bytes([whole[0] + 1]) + packed("x") + b"\x91" * 5000 + b"\xc0" + whole[1:],
    )
    yield (
        "claims-much",
        "A list that says it has 2^32 - 1 elements.",
        "UCF-45",
        "malformed",
        b"\x81" + packed("format") + b"\xdd\xff\xff\xff\xff",
    )


def _pieces(record: Record) -> Json:
    pieces = {name: _ints(data) for name, data in record["pieces"].items()}
    ndims, found, axis = _ints(record["ndims"]), [], 0
    for p, array in enumerate(pieces["array"]):
        stop = axis + ndims[array]
        found.append(
            {
                "array": record["arrays"][array],
                "start": pieces["start"][axis:stop],
                "shape": pieces["shape"][axis:stop],
                "file": record["files"]["path"][pieces["file"][p]],
                **{name: pieces[name][p] for name in ("offset", "nbytes", "row_nbytes", "row_stride")},
            }
        )
        axis = stop
    return found


def _ints(data: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(data) // 8}q", data))


def fragment_maps() -> Iterator[Vector]:
    for name, about, rule, change in _FRAGMENTS_VALID:
        record = changed(fragments(), change)
        sums = [data.hex() for data in (record["checksums"][k : k + 8] for k in range(0, len(record["checksums"]), 8))]
        expect = {"writer": record["writer"], "pieces": _pieces(record), "checksums": sums}
        yield Vector(
            "fragment-maps/valid",
            name,
            about,
            tuple(rule.split()),
            {"base64": as_base64(packed(record))},
            expect=expect,
        )
    yield from _refused("fragment-maps/invalid", fragments(), _FRAGMENTS_INVALID)


def _refused(suite: str, record: Record, cases: _Invalid) -> Iterator[Vector]:
    for name, about, rule, kind, change in cases:
        data = packed(changed(record, change))
        yield Vector(suite, name, about, tuple(rule.split()), {"base64": as_base64(data)}, error=kind)
    for name, about, rule, kind, data in _raw(record):
        yield Vector(suite, f"raw-{name}", about, tuple(rule.split()), {"base64": as_base64(data)}, error=kind)


_INDEX_VALID: tuple[tuple[str, str, str, Change], ...] = (
    ("three-arrays", "A parameter with two states, and an extra.", "UCF-65", lambda m: None),
    ("bfloat16", "An extension type.", "UCF-20", setting("templates", 1, "data_type", to="bfloat16")),
    (
        "one-byte",
        "Elements without byte order.",
        "UCF-13",
        setting("templates", 1, to=template("uint8", [10, 6], layout=0)),
    ),
    (
        "attributes",
        "Attributes of an array's own.",
        "UCF-69",
        setting("templates", 1, "attributes", to='{"true_shape":{"$tuple":[9,6]}}'),
    ),
    ("zero-size", "An extent of 0 has no chunk.", "FRAG-30", setting("arrays", "shape", to=column([0, 10, 6, 10, 6]))),
    (
        "no-arrays",
        "Values only.",
        "UCF-80",
        lambda m: m.update(arrays=dict.fromkeys(m["arrays"], b"")),
    ),
)

_INDEX_INVALID: _Invalid = (
    ("version-2", "A later version.", "UCF-72", "unsupported", setting("version", to=2)),
    ("member-unknown", "One member more.", "UCF-44", "malformed", setting("extra", to=1)),
    ("member-missing", "No leaves.", "UCF-44", "malformed", lambda m: m.pop("leaves")),
    ("dtype-unknown", "int2 is not known.", "UCF-20", "unsupported", setting("templates", 0, "data_type", to="int2")),
    (
        "dtype-e4m3",
        "Another encoding than e4m3fn.",
        "UCF-20",
        "unsupported",
        setting("templates", 0, "data_type", to="float8_e4m3"),
    ),
    (
        "codec-unknown",
        "Compressed.",
        "UCF-66",
        "unsupported",
        setting("templates", 0, "codecs", to='[{"name":"zstd"}]'),
    ),
    (
        "codec-big-endian",
        "Big-endian.",
        "UCF-66",
        "unsupported",
        lambda m: m["templates"][0].update(codecs=m["templates"][0]["codecs"].replace("little", "big")),
    ),
    ("chunk-zero", "A chunk of nothing.", "UCF-64", "malformed", setting("templates", 0, "chunk_shape", to=[0])),
    (
        "chunk-huge",
        "A chunk beyond 1 GiB.",
        "UCF-94",
        "limit-exceeded",
        setting("templates", 0, "chunk_shape", to=[2**27 + 1]),
    ),
    ("chunk-axes", "33 axes.", "UCF-93", "limit-exceeded", setting("templates", 0, "chunk_shape", to=[1] * 33)),
    (
        "chunks-many",
        "2^24 + 1 chunks.",
        "UCF-95",
        "limit-exceeded",
        setting("arrays", "shape", to=column([3 * 2**24 + 1, 10, 6, 10, 6])),
    ),
    (
        "extent-huge",
        "Beyond 2^48.",
        "UCF-93",
        "limit-exceeded",
        setting("arrays", "shape", to=column([2**48 + 1, 10, 6, 10, 6])),
    ),
    (
        "extent-negative",
        "Below zero.",
        "UCF-46",
        "malformed",
        setting("arrays", "shape", to=column([-1, 10, 6, 10, 6])),
    ),
    (
        "shape-short",
        "An extent is missing.",
        "UCF-46",
        "malformed",
        setting("arrays", "shape", to=column([3, 10, 6, 10])),
    ),
    ("layout-negative", "Layout -1.", "UCF-44", "malformed", setting("templates", 1, "layout", to=-1)),
    (
        "attribute-name",
        "An attribute called name.",
        "UCF-69",
        "malformed",
        setting("templates", 0, "attributes", to='{"name":"x"}'),
    ),
    (
        "attribute-list",
        "Attributes that are no object.",
        "UCF-44",
        "malformed",
        setting("templates", 0, "attributes", to="[]"),
    ),
    (
        "attribute-tag",
        "A tag of the future.",
        "UCF-51",
        "unsupported",
        setting("templates", 0, "attributes", to='{"a":{"$date":"x"}}'),
    ),
    ("section-2", "A third section.", "UCF-46", "malformed", setting("entries", "section", to=column([2, 0]))),
    ("item-beyond", "An item that is not there.", "UCF-46", "malformed", setting("entries", "item", to=column([0, 2]))),
    ("names-short", "A name is missing.", "UCF-44", "malformed", lambda m: m["entries"]["name"].pop()),
    ("name-control", "A name with a bell.", "UCF-30", "unsafe", setting("entries", "name", 1, to="w\x07")),
    ("name-long", "A name of 1,025 bytes.", "UCF-97", "limit-exceeded", setting("entries", "name", 1, to="w" * 1025)),
    ("key-parent", "A key out of the tree.", "UCF-38", "unsafe", setting("entries", "key", 1, to="params/../../w")),
    (
        "key-section",
        "A parameter below extra.",
        "UCF-67",
        "malformed",
        setting("entries", "key", 1, to="extra/model/w"),
    ),
    ("key-depth", "A component too many.", "UCF-67", "malformed", setting("entries", "key", 1, to="params/model/w/x")),
    ("leaf-slash", "A state's key with a slash.", "UCF-67", "malformed", setting("leaves", 1, 1, to="a/b")),
    (
        "leaf-missing",
        "A parameter without state.",
        "UCF-67",
        "malformed",
        setting("arrays", "leaf", to=column([0, 0, 2])),
    ),
    ("leaf-three", "Three of two.", "UCF-44", "malformed", setting("leaves", 1, to=["a", "a", "a"])),
    (
        "entry-beyond",
        "An entry that is not there.",
        "UCF-46",
        "malformed",
        setting("arrays", "entry", to=column([0, 1, 2])),
    ),
    ("keys-order", "Keys fall.", "UCF-65", "malformed", setting("arrays", "leaf", to=column([0, 2, 1]))),
    ("keys-twice", "One key twice.", "UCF-65", "malformed", setting("arrays", "leaf", to=column([0, 1, 1]))),
    ("writers-order", "Writers fall.", "UCF-68", "malformed", setting("writer_sets", 1, to=[[1, 1], [0, 0]])),
    ("writers-huge", "Writer 2^20.", "UCF-96", "limit-exceeded", setting("writer_sets", 0, to=[[2**20, 2**20]])),
    (
        "writers-bomb",
        "Nine million writers in a few bytes.",
        "UCF-91",
        "limit-exceeded",
        setting("writer_sets", to=[[[0, 2**20 - 1]]] * 9),
    ),
    ("table-twice", "Two tables of one.", "UCF-61", "malformed", lambda m: m["tables"].append(table())),
)


def indexes() -> Iterator[Vector]:
    for name, about, rule, change in _INDEX_VALID:
        record = changed(index(), change)
        expect = {"arrays": _arrays(record)}
        yield Vector("indexes/valid", name, about, tuple(rule.split()), {"base64": as_base64(packed(record))}, expect=expect)
    yield from _refused("indexes/invalid", index(), _INDEX_INVALID)


def _arrays(record: Record) -> Json:
    arrays = {name: _ints(data) for name, data in record["arrays"].items()}
    found, axis = [], 0
    for entry, leaf, like, writers in zip(arrays["entry"], arrays["leaf"], arrays["template"], arrays["writers"], strict=True):
        shape = record["templates"][like]
        stop = axis + len(shape["chunk_shape"])
        state, key = record["leaves"][leaf]
        found.append(
            {
                "key": record["entries"]["key"][entry] + (f"/{key}" if state else ""),
                "name": record["entries"]["name"][entry],
                "state": state,
                "dtype": shape["data_type"],
                "shape": arrays["shape"][axis:stop],
                "chunk_shape": shape["chunk_shape"],
                "writers": [w for low, high in record["writer_sets"][writers] for w in range(low, high + 1)],
            }
        )
        axis = stop
    return found
