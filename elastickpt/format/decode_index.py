"""The index read from disk, in columns, every array held against the limits; `encode_index` is the way there. [UCF-64..69]"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, repeat
from math import log2, prod
from operator import lt
from typing import NamedTuple

import numpy as np

from elastickpt.errors import LimitExceeded, Malformed, Unsupported
from elastickpt.format.array_columns import ArrayColumns, ArrayNames, ArrayTemplate
from elastickpt.format.arrays import ArrayId, ArraySpec, Section, dtype_named
from elastickpt.format.canonical_json import dump, parse
from elastickpt.format.decode_values import decode_value
from elastickpt.format.documents import codecs_of
from elastickpt.format.encode_fragments import check_version
from elastickpt.format.encode_index import FORMAT, SECTIONS
from elastickpt.format.keys import checked_name, checked_names, checked_path, checked_paths, depth_of
from elastickpt.format.piece_columns import starts
from elastickpt.format.records import IndexPart
from elastickpt.format.strict_reading import IntColumn, RankRuns, StrictObject, integers, pair, take_ints, text, unpack
from elastickpt.format.tables import take_tables
from elastickpt.format.values import Value
from elastickpt.format.version import MAX_ARRAYS, MAX_CHUNK_NBYTES, MAX_CHUNKS, MAX_DIM, MAX_MANIFEST_NBYTES, MAX_NDIM


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


class _Entries(NamedTuple):
    """What the states of one parameter share, one entry a parameter in every column."""

    section: list[Section]
    item: list[str]
    name: Sequence[str]
    key: Sequence[str]


class _Rows(NamedTuple):
    templates: list[ArrayTemplate]
    entries: _Entries
    leaves: list[tuple[str, str]]
    writer_sets: list[tuple[int, ...]]


def _template(members: StrictObject) -> ArrayTemplate:
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
    return ArrayTemplate(dtype.name, dtype.itemsize, chunk_shape, layout, attributes)


def _attributes(data: str, *, where: str) -> tuple[tuple[str, Value], ...]:
    found = parse(data, where=where)
    if not isinstance(found, dict) or {"item", "name", "state"} & found.keys():
        raise Malformed(f"{where}: expected an object without the members item, name and state")
    return tuple((text(name, where=where), decode_value(one, where=f"{where}/{name}")) for name, one in found.items())


def _entries(members: StrictObject) -> _Entries:
    items = tuple(checked_name(item) for item in members.texts("items"))
    names, keys = checked_names(members.texts("name")), checked_paths(members.texts("key"))
    if len(names) != len(keys):
        raise Malformed(f"{members.where}: {len(names)} names, {len(keys)} keys")
    section = take_ints(members, "section", length=len(names), high=len(SECTIONS) - 1).tolist()
    item = take_ints(members, "item", length=len(names), high=len(items) - 1).tolist()
    members.close()
    return _Entries([SECTIONS[s] for s in section], [items[i] for i in item], names, keys)


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


def _arrays(members: StrictObject, rows: _Rows) -> ArrayColumns:
    entry = take_ints(members, "entry", high=len(rows.entries.key) - 1)
    count = len(entry)
    if count > MAX_ARRAYS:
        raise LimitExceeded(f"{members.where}: {count} arrays, the limit is {MAX_ARRAYS}")
    leaf = take_ints(members, "leaf", length=count, high=len(rows.leaves) - 1)
    template = take_ints(members, "template", length=count, high=len(rows.templates) - 1)
    writers = take_ints(members, "writers", length=count, high=len(rows.writer_sets) - 1)
    axes = int(np.bincount(template, minlength=len(rows.templates)) @ _ndims(rows.templates))
    shape = take_ints(members, "shape", length=axes)
    members.close()
    keys, names = _named(rows, entry, leaf)
    arrays = ArrayColumns(keys, names, rows.templates, template, shape, rows.writer_sets, writers)
    if not _are_regular(arrays, rows, entry, leaf):
        for place in range(count):
            _require(arrays, place, members.where)
    return arrays


def _ndims(templates: Sequence[ArrayTemplate]) -> IntColumn:
    return np.array([len(one.chunk_shape) for one in templates], dtype=np.int64)


def _named(rows: _Rows, entry: IntColumn, leaf: IntColumn) -> tuple[tuple[str, ...], ArrayNames]:
    """The keys and names of arrays, given by the numbers of their entries and leaves."""
    own, states = rows.entries, [state for state, _ in rows.leaves]
    ends = [f"/{key}" if state else "" for state, key in rows.leaves]
    of, which = entry.tolist(), leaf.tolist()
    keys = tuple(own.key[e] + ends[k] for e, k in zip(of, which, strict=True))
    section, item, name = ([column[e] for e in of] for column in own[:3])
    return keys, ArrayNames(section, item, name, [states[k] for k in which])


_FOLDERS: Mapping[Section, str] = {section: f"{section}/" for section in SECTIONS}


def _are_regular(arrays: ArrayColumns, rows: _Rows, entry: IntColumn, leaf: IntColumn) -> bool:
    """Whether all arrays pass `_require`, as far as can be told at once: False where one of them may not."""
    own, stateful = rows.entries, np.array([bool(state) for state, _ in rows.leaves], dtype=np.bool_)
    extra = np.array([section == "extra" for section in own.section], dtype=np.bool_)
    if (extra[entry] == stateful[leaf]).any() or (arrays.shape.size and int(arrays.shape.max()) > MAX_DIM):
        return False
    if not all(map(str.startswith, own.key, map(_FOLDERS.__getitem__, own.section))):
        return False
    slashes = [name.count("/") + 2 if name else 1 for name in own.name]
    wanted = np.where(extra, np.array(slashes, dtype=np.int64), 2)  # of a parameter's key, without that of the state
    if list(map(str.count, own.key, repeat("/"))) != wanted.tolist() or not all(map(lt, arrays.keys, arrays.keys[1:])):
        return False
    chunk = np.array([n for one in rows.templates for n in one.chunk_shape], dtype=np.int64)
    first = starts(_ndims(rows.templates))[arrays.template]
    array = np.repeat(np.arange(len(arrays)), arrays.ndims)
    own_chunk = chunk[first[array] + np.arange(len(array)) - arrays.axis_start[array]]
    chunks = np.log2(np.maximum(-(-arrays.shape // own_chunk), 1))
    return not chunks.any() or bool(np.bincount(array, weights=chunks).max() < log2(MAX_CHUNKS) - 1e-6)


def _require(arrays: ArrayColumns, place: int, where: str) -> None:
    """Passes for an array that may stand in an index, behind the ones before it."""
    section, state = arrays.names.section[place], arrays.names.state[place]
    array = ArrayId(section, arrays.names.item[place], arrays.names.name[place], state)
    key, shape, like = arrays.keys[place], arrays.shapes[place], arrays.templates[arrays.template[place]]
    slashes = array.name.count("/") + 2 if array.name and not state else depth_of(array)
    if not key.startswith(_FOLDERS[section]) or key.count("/") != slashes:  # [UCF-67]
        raise Malformed(f"array {array}: {key!r} is no key of it")
    chunks = prod(-(-extent // step) for extent, step in zip(shape, like.chunk_shape, strict=True))
    if chunks > MAX_CHUNKS:
        raise LimitExceeded(f"array {key!r} of shape {shape} has {chunks} chunks, the limit is {MAX_CHUNKS}")
    ArraySpec(array, shape, like.dtype)
    if place and key <= (last := arrays.keys[place - 1]):  # [UCF-65]
        raise Malformed(f"{where}: {key!r} after {last!r}: keys out of order, or twice")
