"""The index on disk: what each array is and which writers hold pieces of it, in columns; one msgpack map a part.
[UCF-64..69]

Arrays that share element type, grid, layout and attributes share a template; states of one parameter share its entry;
arrays held by the same writers share a writer set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Generic, NamedTuple, TypeVar, get_args

from elastickpt.errors import LimitExceeded, Malformed, Unsupported, ValueNotCarried
from elastickpt.format.arrays import ArrayId, ArraySpec, Section, dtype_named
from elastickpt.format.canonical_json import dump, parse
from elastickpt.format.decode_values import decode_value
from elastickpt.format.documents import codecs_of
from elastickpt.format.encode_fragments import check_version
from elastickpt.format.encode_values import encode_value
from elastickpt.format.keys import checked_name, checked_names, checked_path, checked_paths, depth_of
from elastickpt.format.records import FORMAT_VERSION, ArrayRecord, IndexPart, OptimizerTable
from elastickpt.format.strict_reading import (
    RankRuns,
    StrictObject,
    integers,
    pack_ints,
    pack_map,
    pack_members,
    pack_runs,
    pair,
    take_ints,
    text,
    unpack,
)
from elastickpt.format.tables import pack_tables, take_tables
from elastickpt.format.values import Value
from elastickpt.format.version import (
    MAX_ARRAYS,
    MAX_CHUNK_NBYTES,
    MAX_CHUNKS,
    MAX_DIM,
    MAX_DOCUMENT_NBYTES,
    MAX_MANIFEST_NBYTES,
    MAX_NDIM,
)

FORMAT = "elastickpt-index"
_SECTIONS: tuple[Section, ...] = get_args(Section)
_Row = TypeVar("_Row")


class _Table(Generic[_Row]):
    """Numbers rows by first appearance."""

    def __init__(self) -> None:
        self.rows: dict[_Row, int] = {}

    def number(self, row: _Row) -> int:
        return self.rows.setdefault(row, len(self.rows))


class _Entry(NamedTuple):
    """What the states of one parameter share; for `extra` one array."""

    section: Section
    item: str
    name: str
    key: str


class _Template(NamedTuple):
    """What many arrays share; `attributes` is the canonical typed JSON of an object."""

    dtype: str
    chunk_shape: tuple[int, ...]
    layout: int | None
    attributes: str


def _entry_of(record: ArrayRecord) -> tuple[_Entry, tuple[str, str]]:
    array = record.spec.id
    if array.section == "extra":
        return _Entry(array.section, array.item, array.name, record.key), ("", "")
    key, _, leaf = record.key.rpartition("/")
    return _Entry(array.section, array.item, array.name, key), (array.state, leaf)


def _template_of(record: ArrayRecord) -> _Template:
    if not record.attributes:
        return _Template(record.spec.dtype, record.chunk_shape, record.layout, "{}")
    where = str(record.spec.id)
    own = dump({name: encode_value(value, where=f"{where}/{name}") for name, value in record.attributes})
    if len(own) > MAX_DOCUMENT_NBYTES // 2:  # the document holds it beside the names
        raise ValueNotCarried(f"{where}: attributes of {len(own)} bytes, the limit is {MAX_DOCUMENT_NBYTES // 2}")
    return _Template(record.spec.dtype, record.chunk_shape, record.layout, own)


def encode_index(part: IndexPart) -> bytes:
    """The bytes of one part of the index.

    Raises Malformed for arrays out of the order of their keys, ValueNotCarried, and LimitExceeded when it needs more
    parts than one.
    """
    return with_tables(encode_arrays(part.arrays), part.tables)


_MEMBERS = 8  # of a part


def encode_arrays(arrays: Sequence[ArrayRecord]) -> bytes:
    """What a part says of its arrays, for `with_tables`. Raises likewise."""
    if any(low.key >= high.key for low, high in pairwise(arrays)):
        raise Malformed("arrays of an index part stand out of the order of their keys, or twice")
    entries, leaves, templates = _Table[_Entry](), _Table[tuple[str, str]](), _Table[_Template]()
    writer_sets = _Table[tuple[int, ...]]()
    columns: dict[str, list[int]] = {"entry": [], "leaf": [], "template": [], "writers": []}
    for record in arrays:
        entry, leaf = _entry_of(record)
        columns["entry"].append(entries.number(entry))
        columns["leaf"].append(leaves.number(leaf))
        columns["template"].append(templates.number(_template_of(record)))
        columns["writers"].append(writer_sets.number(record.writers))
    out: dict[str, object] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "templates": [_pack_template(template) for template in templates.rows],
        "entries": _pack_entries(entries.rows),
        "leaves": [list(leaf) for leaf in leaves.rows],
        "writer_sets": [pack_runs(ranks) for ranks in writer_sets.rows],
        "arrays": {
            **{name: pack_ints(column) for name, column in columns.items()},
            "shape": pack_ints([extent for record in arrays for extent in record.spec.shape]),
        },
    }
    return pack_members(out)


def with_tables(arrays: bytes, tables: Sequence[OptimizerTable]) -> bytes:
    """A part of what `encode_arrays` encoded and these tables. Raises ValueNotCarried, LimitExceeded."""
    data = pack_map(_MEMBERS, arrays + pack_members({"tables": pack_tables(tables)}))
    if len(data) > MAX_MANIFEST_NBYTES:  # [UCF-90]
        raise LimitExceeded(f"an index part has {len(data)} bytes: it needs more parts")
    return data


def _pack_template(template: _Template) -> dict[str, object]:
    return {
        "data_type": template.dtype,
        "chunk_shape": list(template.chunk_shape),
        "codecs": dump(codecs_of(dtype_named(template.dtype))),
        "layout": template.layout,
        "attributes": template.attributes,
    }


def _pack_entries(entries: Iterable[_Entry]) -> dict[str, object]:
    rows = list(entries)
    items = _Table[str]()
    return {
        "section": pack_ints([_SECTIONS.index(row.section) for row in rows]),
        "item": pack_ints([items.number(row.item) for row in rows]),
        "items": list(items.rows),
        "name": [row.name for row in rows],
        "key": [row.key for row in rows],
    }


def decode_index(data: bytes, *, path: str) -> IndexPart:
    """One part of the index, every array checked against the limits. `path` is for messages.

    Raises LimitExceeded, Unsupported, Malformed or Unsafe.
    """
    if len(data) > MAX_MANIFEST_NBYTES:
        raise LimitExceeded(f"{path}: {len(data)} bytes, the limit is {MAX_MANIFEST_NBYTES}")
    members = unpack(data, path=path)
    check_version(members, FORMAT)
    templates = [
        _template(StrictObject(one, where=f"{path}/templates[{k}]")) for k, one in enumerate(members.sequence("templates"))
    ]
    entries = _entries(members.members("entries"))
    leaves = [_leaf(one, f"{path}/leaves[{k}]") for k, one in enumerate(members.sequence("leaves"))]
    runs = RankRuns()
    writer_sets = [_writers(runs, one, f"{path}/writer_sets[{k}]") for k, one in enumerate(members.sequence("writer_sets"))]
    rows = _Rows(templates, entries, leaves, writer_sets)
    arrays = _arrays(members.members("arrays"), rows)
    part = IndexPart(arrays, take_tables(members, "tables"))
    members.close()
    return part


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A template as read: the attributes decoded once for all arrays that share it."""

    dtype: str
    itemsize: int
    chunk_shape: tuple[int, ...]
    layout: int | None
    attributes: tuple[tuple[str, Value], ...]


@dataclass(frozen=True, slots=True)
class _Rows:
    templates: list[_Decoded]
    entries: list[_Entry]
    leaves: list[tuple[str, str]]
    writer_sets: list[tuple[int, ...]]


def _template(members: StrictObject) -> _Decoded:
    where = members.where
    dtype = dtype_named(members.text("data_type"))
    chunk_shape = integers(members.take("chunk_shape"), where=f"{where}/chunk_shape")
    if len(chunk_shape) > MAX_NDIM or any(extent > MAX_DIM for extent in chunk_shape):
        raise LimitExceeded(f"{where}/chunk_shape: {chunk_shape[:40]} is beyond {MAX_NDIM} axes or 2^48 elements an axis")
    if any(extent < 1 for extent in chunk_shape):
        raise Malformed(f"{where}/chunk_shape: {chunk_shape} has an extent below 1")
    if prod(chunk_shape) * dtype.itemsize > MAX_CHUNK_NBYTES:
        raise LimitExceeded(f"{where}/chunk_shape: a chunk of {chunk_shape} {dtype.name} is beyond {MAX_CHUNK_NBYTES} bytes")
    codecs = members.text("codecs")
    if codecs != dump(codecs_of(dtype)):  # [UCF-66]
        raise Unsupported(f"{where}/codecs: {codecs[:200]}; this release reads {dump(codecs_of(dtype))} for {dtype.name}")
    layout = members.take("layout")
    attributes = _attributes(members.text("attributes"), where=f"{where}/attributes")
    members.close()
    if layout is not None and (not isinstance(layout, int) or isinstance(layout, bool) or layout < 0):
        raise Malformed(f"{where}/layout: expected an integer or nil, found {layout!r}")
    return _Decoded(dtype.name, dtype.itemsize, chunk_shape, layout, attributes)


def _attributes(data: str, *, where: str) -> tuple[tuple[str, Value], ...]:
    found = parse(data, where=where)
    if not isinstance(found, dict) or {"item", "name", "state"} & found.keys():
        raise Malformed(f"{where}: expected an object without the members item, name and state")
    return tuple((text(name, where=where), decode_value(one, where=f"{where}/{name}")) for name, one in found.items())


def _entries(members: StrictObject) -> list[_Entry]:
    items = tuple(checked_name(item) for item in members.texts("items"))
    names, keys = checked_names(members.texts("name")), checked_paths(members.texts("key"))
    if len(names) != len(keys):
        raise Malformed(f"{members.where}: {len(names)} names, {len(keys)} keys")
    section = take_ints(members, "section", length=len(names), high=len(_SECTIONS) - 1).tolist()
    item = take_ints(members, "item", length=len(names), high=len(items) - 1).tolist()
    members.close()
    return [_Entry(_SECTIONS[s], items[i], name, key) for s, i, name, key in zip(section, item, names, keys, strict=True)]


def _leaf(value: object, where: str) -> tuple[str, str]:
    state, key = pair(value, where=where)
    found = (checked_name(text(state, where=where)), text(key, where=where))
    if not found[0] and not found[1]:
        return found
    if "/" in checked_path(found[1]):
        raise Malformed(f"{where}: the key {found[1]!r} of a state has a slash")
    return found


def _writers(runs: RankRuns, value: object, where: str) -> tuple[int, ...]:
    found = runs.expand(value, where=where)
    if any(low >= high for low, high in pairwise(found)):
        raise Malformed(f"{where}: writers out of order, or twice")
    return found


def _arrays(members: StrictObject, rows: _Rows) -> tuple[ArrayRecord, ...]:
    entry = take_ints(members, "entry", high=len(rows.entries) - 1).tolist()
    count = len(entry)
    if count > MAX_ARRAYS:
        raise LimitExceeded(f"{members.where}: {count} arrays, the limit is {MAX_ARRAYS}")
    leaf = take_ints(members, "leaf", length=count, high=len(rows.leaves) - 1).tolist()
    template = take_ints(members, "template", length=count, high=len(rows.templates) - 1).tolist()
    writers = take_ints(members, "writers", length=count, high=len(rows.writer_sets) - 1).tolist()
    axes = sum(len(rows.templates[t].chunk_shape) for t in template)
    shape = take_ints(members, "shape", length=axes).tolist()  # ArraySpec checks the limit
    members.close()
    found: list[ArrayRecord] = []
    axis, last = 0, ""
    for e, t, k, w in zip(entry, template, leaf, writers, strict=True):
        like = rows.templates[t]
        extents = tuple(shape[axis : axis + len(like.chunk_shape)])
        axis += len(extents)
        record = _record(rows.entries[e], rows.leaves[k], like, extents, rows.writer_sets[w])
        if record.key <= last:  # [UCF-65]
            raise Malformed(f"{members.where}: {record.key!r} after {last!r}: keys out of order, or twice")
        last = record.key
        found.append(record)
    return tuple(found)


_FOLDERS: Mapping[Section, str] = {section: f"{section}/" for section in _SECTIONS}


def _record(
    entry: _Entry, leaf: tuple[str, str], like: _Decoded, shape: tuple[int, ...], writers: tuple[int, ...]
) -> ArrayRecord:
    state, leaf_key = leaf
    key = f"{entry.key}/{leaf_key}" if state else entry.key
    array = ArrayId(entry.section, entry.item, entry.name, state)
    slashes = entry.name.count("/") + 2 if entry.name and not state else depth_of(array)
    if not key.startswith(_FOLDERS[entry.section]) or key.count("/") != slashes:  # [UCF-67]
        raise Malformed(f"array {array}: {key!r} is no key of it")
    alike = shape == like.chunk_shape
    chunks = 1 if alike else prod(-(-extent // step) for extent, step in zip(shape, like.chunk_shape, strict=True))
    if chunks > MAX_CHUNKS:
        raise LimitExceeded(f"array {key!r} of shape {shape} has {chunks} chunks, the limit is {MAX_CHUNKS}")
    return ArrayRecord(ArraySpec(array, shape, like.dtype), key, like.chunk_shape, like.layout, writers, like.attributes)
