"""The index on disk: what each array is and which writers hold pieces of it, in columns; one msgpack map a part.
[UCF-64..69]

Arrays that share element type, grid, layout and attributes share a template; states of one parameter share its entry;
arrays held by the same writers share a writer set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar, get_args

from elastickpt.errors import LimitExceeded, Malformed, ValueNotCarried
from elastickpt.format.arrays import Section, dtype_named
from elastickpt.format.canonical_json import dump
from elastickpt.format.documents import codecs_of
from elastickpt.format.encode_values import encode_value
from elastickpt.format.records import FORMAT_VERSION, ArrayRecord, IndexPart, OptimizerTable
from elastickpt.format.strict_reading import pack_ints, pack_map, pack_members, pack_runs
from elastickpt.format.tables import pack_tables
from elastickpt.format.version import MAX_DOCUMENT_NBYTES, MAX_MANIFEST_NBYTES

FORMAT = "elastickpt-index"
SECTIONS: tuple[Section, ...] = get_args(Section)
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
    known: dict[object, tuple[int, int]] = {}  # template and writers of those without attributes
    rows: list[tuple[int, int, int, int]] = []
    for record in arrays:
        entry, leaf = _entry_of(record)
        how = None if record.attributes else (record.spec.dtype, record.chunk_shape, record.layout, record.writers)
        alike = known.get(how)
        if alike is None:
            alike = templates.number(_template_of(record)), writer_sets.number(record.writers)
            if how is not None:
                known[how] = alike
        rows.append((entries.number(entry), leaves.number(leaf), *alike))
    columns = dict(zip(("entry", "leaf", "template", "writers"), zip(*rows, strict=True) if rows else [()] * 4, strict=True))
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
        "section": pack_ints([SECTIONS.index(row.section) for row in rows]),
        "item": pack_ints([items.number(row.item) for row in rows]),
        "items": list(items.rows),
        "name": [row.name for row in rows],
        "key": [row.key for row in rows],
    }
