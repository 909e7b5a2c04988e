"""The proof that an attempt is whole: every element of every array stored exactly once. No I/O. [SAVE-50, FRAG-30, FRAG-31]"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, compress
from operator import attrgetter

import numpy as np

from elastickpt.errors import CoverageOverlap, StructureConflict
from elastickpt.format.arrays import Box
from elastickpt.format.documents import upper_documents
from elastickpt.format.encode_fragments import KnownFragments
from elastickpt.format.encode_index import encode_arrays
from elastickpt.format.encode_values import value_digest
from elastickpt.format.many import many
from elastickpt.format.piece_columns import FragmentColumns, PieceColumns, starts
from elastickpt.format.records import ArrayRecord, OptimizerTable
from elastickpt.format.strict_reading import IntColumn
from elastickpt.format.tables import TableKey, TableName, TableRow, rows_of, table_of
from elastickpt.format.typed_values import TypedValue
from elastickpt.layout.algebra import require_coverage
from elastickpt.layout.references import references_of, within_limits

_Boxes = tuple[int, tuple[str, ...], IntColumn, IntColumn, IntColumn, IntColumn]  # a writer's; columns as in PieceColumns


PART_ARRAYS = 200_000  # of one index part: about 40 MB, below the limit of 64 MiB


def parts_of(arrays: tuple[ArrayRecord, ...]) -> list[tuple[ArrayRecord, ...]]:
    """The arrays, parted as the index is; one empty part for none."""
    return [arrays[begin : begin + PART_ARRAYS] for begin in range(0, max(len(arrays), 1), PART_ARRAYS)]


@dataclass(frozen=True, eq=False)
class Proof:
    """Arrays with their writers, as they follow from these boxes."""

    boxes: tuple[_Boxes, ...]
    arrays: tuple[ArrayRecord, ...]

    @cached_property
    def documents(self) -> tuple[tuple[str, bytes], ...]:
        """Those that a committer writes, by path."""
        return tuple(upper_documents(self.arrays))

    @cached_property
    def index(self) -> tuple[tuple[tuple[ArrayRecord, ...], bytes], ...]:
        """The parts of the index, each with what it says of its arrays. Raises what `encode_arrays` raises."""
        return tuple((part, encode_arrays(part)) for part in parts_of(self.arrays))


_Places = tuple[tuple[int, ...], IntColumn, IntColumn, IntColumn, IntColumn]  # a writer's: of its files, then of its pieces


@dataclass(frozen=True, eq=False)
class AttemptReferences:
    """The references that were made for an attempt, and of what."""

    arrays: tuple[ArrayRecord, ...]
    places: tuple[_Places, ...]
    attempt: str
    text: str


@dataclass(slots=True)
class ProofMemory:
    """What was proven of the arrays of one outline last, and the references to them; None at first. And of the newest save the
    replicated values, the fragment maps by writer, and the pieces whose bytes were found to be distinct."""

    last: Proof | None = None
    maps: Mapping[int, KnownFragments] = field(default_factory=dict)
    distinct: tuple[tuple[IntColumn, ...], ...] = ()
    references: AttemptReferences | None = None
    values: Mapping[str, TypedValue] = field(default_factory=dict)

    def newest(self, values: Mapping[str, TypedValue]) -> Mapping[str, TypedValue]:
        """The same values, of which those are known that are as in the save before."""
        found = {}
        for pointer, one in values.items():
            last = self.values.get(pointer)
            found[pointer] = last if last is not None and last.text == one.text else one
        self.values = found
        return found


def references_to(
    arrays: tuple[ArrayRecord, ...], maps: Sequence[FragmentColumns], attempt: str, memory: ProofMemory
) -> str | None:
    """The text of `references.json` for these arrays in an attempt's packs; None where a save writes none. What lies as it lay
    in the attempt before is not looked for again. [UCF-162]"""
    places = tuple(map(_places_of, maps))
    made = memory.references
    if made is not None and made.arrays is arrays and all(map(_lie_alike, places, made.places)):
        return made.text.replace(f"/{made.attempt}-", f"/{attempt}-")
    if not within_limits(arrays):
        return None
    text = references_of(arrays, maps).text
    memory.references = AttemptReferences(arrays, places, attempt, text)
    return text


def _places_of(columns: FragmentColumns) -> _Places:
    pieces = columns.pieces
    files = tuple(number for file in columns.files for number in (file.base, file.nbytes))
    return files, pieces.file, pieces.offset, pieces.row_nbytes, pieces.row_stride


def _lie_alike(one: _Places, other: _Places) -> bool:
    return one[0] == other[0] and all(map(_equal, one[1:], other[1:]))


def prove(
    expected: tuple[ArrayRecord, ...], maps: Sequence[FragmentColumns], memory: ProofMemory | None = None
) -> tuple[ArrayRecord, ...]:
    """The expected arrays with their writers, in the order of their keys.

    What was proven of the very same boxes, as the memory of these arrays has it, is not proven again. Raises CoverageGap or
    CoverageOverlap naming array, box and writers; StructureConflict for a piece of an array that nobody announced.
    """
    boxes = tuple((columns.writer, *_boxes_of(columns.pieces)) for columns in maps)
    last = None if memory is None else memory.last
    if last is not None and len(boxes) == len(last.boxes) and all(map(_same, boxes, last.boxes)):
        return last.arrays
    proven = _prove(expected, maps)
    if memory is not None:
        memory.last = Proof(boxes, proven)
    return proven


def _boxes_of(pieces: PieceColumns) -> tuple[tuple[str, ...], IntColumn, IntColumn, IntColumn, IntColumn]:
    return pieces.arrays, pieces.ndims, pieces.array, pieces.start, pieces.shape


def _same(one: _Boxes, other: _Boxes) -> bool:
    return one[:2] == other[:2] and all(map(_equal, one[2:], other[2:]))


def _equal(one: IntColumn, other: IntColumn) -> bool:
    return one is other or np.array_equal(one, other)


def _prove(expected: Sequence[ArrayRecord], maps: Sequence[FragmentColumns]) -> tuple[ArrayRecord, ...]:
    place = {record.key: number for number, record in enumerate(expected)}
    known: list[IntColumn] = []  # of each map: which of the expected its arrays are
    count = np.zeros(len(expected), dtype=np.int64)
    for columns in maps:
        pieces = columns.pieces
        strange = next((key for key in pieces.arrays if key not in place), None)
        if strange is not None:
            raise StructureConflict(f"writer {columns.writer} stored array {strange}, which no rank announced")
        known.append(np.array([place[key] for key in pieces.arrays], dtype=np.int64))
        count[known[-1]] += np.bincount(pieces.array, minlength=len(pieces.arrays))
    writers: list[tuple[int, ...]] = [()] * len(expected)
    for columns, numbers in zip(maps, known, strict=True):
        alone = (columns.writer,)
        for number in numbers[_stored_whole(columns.pieces, expected, numbers, count)].tolist():
            writers[number] = alone
    left = [number for number, own in enumerate(writers) if not own]
    writers_of = _swept([expected[number] for number in left], maps) if left else ()
    for number, own in zip(left, writers_of, strict=True):
        writers[number] = own
    kept = {name: map(attrgetter(name), expected) for name in ("spec", "key", "chunk_shape", "layout", "attributes")}
    proven = many(ArrayRecord, len(expected), writers=writers, **kept)
    return tuple(sorted(proven, key=attrgetter("key")))


def _stored_whole(pieces: PieceColumns, expected: Sequence[ArrayRecord], numbers: IntColumn, count: IntColumn) -> IntColumn:
    """Which of a map's arrays are one piece of it alone that is all of the array: the usual small one, which needs no sweep."""
    first = np.searchsorted(pieces.array, np.arange(len(pieces.arrays)))
    mine = np.flatnonzero(count[numbers] == 1)
    shapes = [expected[number].spec.shape for number in numbers[mine].tolist()]
    ndims = np.array([len(shape) for shape in shapes], dtype=np.int64)
    fits = pieces.ndims[mine] == ndims
    mine, ndims = mine[fits], ndims[fits]
    flat = chain.from_iterable(compress(shapes, fits.tolist()))
    wanted = np.fromiter(flat, dtype=np.int64, count=int(ndims.sum()))
    which = np.repeat(np.arange(len(mine)), ndims)
    axes = pieces.axis_start[first[mine]][which] + np.arange(len(which)) - starts(ndims)[which]
    other = np.zeros(len(mine), dtype=np.bool_)
    other[which[(pieces.start[axes] != 0) | (pieces.shape[axes] != wanted)]] = True
    whole: IntColumn = mine[~other]
    return whole


def _swept(expected: Sequence[ArrayRecord], maps: Sequence[FragmentColumns]) -> list[tuple[int, ...]]:
    """The writers of each of these arrays, every element of which is found to be stored once."""
    boxes: dict[str, list[Box]] = {record.key: [] for record in expected}
    owners: dict[str, list[int]] = {record.key: [] for record in expected}
    for columns in maps:
        for key, places in columns.pieces.by_array().items():
            if key in boxes:
                boxes[key].extend(map(columns.pieces.box, places))
                owners[key].extend([columns.writer] * len(places))
    for record in sorted(expected, key=attrgetter("key")):
        require_coverage(record.spec, boxes[record.key], [f"writer {writer}" for writer in owners[record.key]])
    return [tuple(sorted(set(owners[record.key]))) for record in expected]


def require_distinct_ranges(maps: Sequence[FragmentColumns], memory: ProofMemory | None = None) -> None:
    """Raises CoverageOverlap where two pieces claim the same bytes of a file. [FRAG-34]

    Pieces of one array are disjoint boxes, so this can only happen between arrays or through a wrong offset. What was found of
    the very same columns, as the memory has it, is not looked for again.
    """
    columns = tuple((one.pieces.file, one.pieces.offset, one.pieces.nbytes, one.pieces.row_nbytes) for one in maps)
    if memory is not None and [list(map(id, one)) for one in columns] == [list(map(id, one)) for one in memory.distinct]:
        return
    _require_distinct_ranges(maps)
    if memory is not None:
        memory.distinct = columns


def _require_distinct_ranges(maps: Sequence[FragmentColumns]) -> None:
    numbers: dict[tuple[int, str], int] = {}
    rows = []  # of each piece: its file, first byte, end, writer
    for columns in maps:
        pieces = columns.pieces
        mine = np.flatnonzero(pieces.row_nbytes == pieces.nbytes)
        if len(mine):
            known = [numbers.setdefault((file.base, file.path), len(numbers)) for file in columns.files]
            first = pieces.offset[mine]
            file = np.array(known, dtype=np.int64)[pieces.file[mine]]
            rows.append(np.stack([file, first, first + pieces.nbytes[mine], np.full_like(first, columns.writer)]))
    if not rows:
        return
    files, starts, stops, writers = (every := np.concatenate(rows, axis=1))[:, np.lexsort((every[1], every[0]))]
    shared = np.flatnonzero((files[1:] == files[:-1]) & (starts[1:] < stops[:-1]))
    for at in shared[:1].tolist():
        _, path = list(numbers)[int(files[at])]
        raise CoverageOverlap(
            f"{path}: bytes {starts[at + 1]} to {stops[at]} are claimed by writers {writers[at]} and {writers[at + 1]}"
        )


# -- what optimizers hold per parameter --------------------------------------------------------------------------------


def merge_tables(tables: Iterable[OptimizerTable]) -> tuple[OptimizerTable, ...]:
    """One table an optimizer, parameters sorted, from the tables of all writers.

    Raises StructureConflict where two writers hold different values of one parameter.
    """
    rows: dict[str, dict[TableName, TableRow]] = {}
    for table in tables:
        of_item = rows.setdefault(table.item, {})
        for parameter, row in rows_of(table).items():
            known = of_item.setdefault(parameter, row)
            if known is not row and _digests(known) != _digests(row):
                raise StructureConflict(_different(table.item, parameter, known, row))
    return tuple(table_of(item, of_item) for item, of_item in sorted(rows.items()))


def _different(item: str, parameter: tuple[str, str], one: TableRow, other: TableRow) -> str:
    mine, theirs = _digests(one), _digests(other)
    differing = [key for key in dict.fromkeys((*one, *other)) if mine.get(key) != theirs.get(key)]
    told = "; ".join(f"{key} ({kind}): {one.get((kind, key))!r} and {other.get((kind, key))!r}" for kind, key in differing[:4])
    return f"optimizer {item!r}: two ranks hold different settings of parameter {'/'.join(parameter)}: {told}"


def _digests(row: TableRow) -> dict[TableKey, str]:
    return {key: value_digest(value) for key, value in row.items()}
