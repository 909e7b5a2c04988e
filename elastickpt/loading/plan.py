"""What a load will read: decided, and held against the fragment maps and the files, before the first byte is filled.

wanted boxes --> pieces of the fragment maps --> reads (layout.reads) --> units, by file and offset

Units whose bytes follow each other in their file and in memory (pieces of a part that several ranks held) are read at once: a
read costs 0.1 ms apart from its bytes, and a job on fewer ranks than wrote finds several small pieces in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastickpt.errors import CoverageGap, CoverageOverlap, Damaged, LayoutUnsupported, Malformed, MissingFile, WrongLength
from elastickpt.format.arrays import Box
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, StoredFile, StoredPiece
from elastickpt.layout.algebra import CoverageReport, intersect, prove_box_coverage
from elastickpt.layout.placement import places_that_hold
from elastickpt.layout.reads import Direct, Read, plan_reads
from elastickpt.loading.opened import Opened
from elastickpt.storage.store import Caching

UNIT_NBYTES = 1 << 20

Bytes = NDArray[np.uint8]
Elements = NDArray[np.generic]


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A box of one array, in global coordinates, and the elements to fill: words of the element size, any strides.

    `cache`: "spare" where nobody else on this host is known to want these bytes.
    """

    record: ArrayRecord
    box: Box
    into: Elements
    cache: Caching = "fill"


@dataclass(frozen=True, slots=True, eq=False)
class ReadTarget:
    """The wanted box as bytes in its own C order: the destination's own memory, or a buffer that is copied at the end."""

    wanted: Wanted
    data: Bytes


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Some blocks of one read: bytes [start, end) of a piece, and what they deliver to `target`.

    At most `UNIT_NBYTES` of whole blocks, so that a block is hashed while it is still in the cache.
    """

    file: StoredFile
    piece: StoredPiece
    block_nbytes: int
    start: int
    end: int
    read: Read
    target: ReadTarget


@dataclass(frozen=True, slots=True, eq=False)
class FetchPlan:
    """Units in the order in which their bytes lie, by file. Making it has read records only, and filled nothing."""

    targets: tuple[ReadTarget, ...]
    units: tuple[Unit, ...]


def plan_fetch(opened: Opened, wanted: Sequence[Wanted]) -> FetchPlan:
    """How every destination will be filled. Reads the fragment maps that it needs; blocking.

    Raises Damaged kinds naming the map, or the array with a gap or overlap, StorageFailed kinds for what cannot be read.
    """
    targets = tuple(_target(want) for want in wanted)
    units = [unit for target in targets for unit in _units_of(opened, target)]
    units.sort(key=lambda unit: (unit.file.path, unit.piece.offset + unit.start))
    return FetchPlan(targets, tuple(units))


def require_files(opened: Opened, plan: FetchPlan) -> None:
    """Raises MissingFile or WrongLength, naming an array in it, unless every file of the plan is there and whole."""
    first: dict[StoredFile, Unit] = {}
    for unit in plan.units:
        first.setdefault(unit.file, unit)
    for file, unit in first.items():
        try:
            require_length(unit, opened.store.size(opened.where(file)))
        except WrongLength:
            raise
        except MissingFile:
            raise MissingFile(
                f"{opened.where(file)}: expected {file.nbytes} bytes (in the fragment map), found no such file; "
                f"it holds array {unit.target.wanted.record.spec.id}"
            ) from None
        except Damaged as error:
            raise type(error)(f"{error.message}; it holds array {unit.target.wanted.record.spec.id}") from error


def require_length(unit: Unit, nbytes: int) -> None:
    """Raises WrongLength unless the unit's file has the recorded size."""
    if nbytes != unit.file.nbytes:
        raise WrongLength(
            f"{unit.file.path}: expected {unit.file.nbytes} bytes (in the fragment map), "
            f"found {nbytes}; it holds array {unit.target.wanted.record.spec.id}"
        )


def _target(wanted: Wanted) -> ReadTarget:
    into = wanted.into
    if into.shape != wanted.box.shape:
        raise Malformed(f"array {wanted.record.spec.id}: a destination of shape {into.shape} for box {wanted.box}")
    if into.flags.c_contiguous:
        return ReadTarget(wanted, into.reshape(-1).view(np.uint8))
    return ReadTarget(wanted, np.empty(into.size * into.dtype.itemsize, dtype=np.uint8))


def _pieces_by(
    writers: Sequence[int], opened: Opened, record: ArrayRecord, within: Box
) -> list[tuple[FragmentColumns, StoredPiece]]:
    """The pieces that these writers stored of an array and that hold any of `within`, with their fragment maps."""
    found: list[tuple[FragmentColumns, StoredPiece]] = []
    for writer in writers:
        columns, places = opened.pieces(writer, record.key)
        for place in places:
            box = columns.pieces.box(place)
            if box == within or intersect(box, within) is not None:
                found.append((columns, columns.pieces.piece_of(place, box)))
    return found


def _units_of(opened: Opened, target: ReadTarget) -> list[Unit]:
    want = target.wanted
    if want.box.count == 0:
        return []
    found = require_stored(opened, want.record, want.box)
    units = []
    for columns, piece in found:
        file = columns.files[piece.file]
        for read in _reads_of(want, piece, block_nbytes=columns.block_nbytes):
            step = max(UNIT_NBYTES // columns.block_nbytes, 1) * columns.block_nbytes
            if not isinstance(read.steps[0], Direct) or len(read.steps) > 1:
                step = read.nbytes
            for start in range(read.start, read.end, step):
                end = min(start + step, read.end)
                units.append(Unit(file, piece, columns.block_nbytes, start, end, read, target))
    return units


def require_stored(opened: Opened, record: ArrayRecord, box: Box) -> list[tuple[FragmentColumns, StoredPiece]]:
    """The pieces that hold a box of an array. Raises CoverageGap or CoverageOverlap unless they hold every element of it
    exactly once. [FRAG-30, FRAG-31]

    Maps of writers that by the layout held nothing of it are not read, unless the others leave a gap. [FRAG-35]
    """
    holders = _holders(opened, record, box)
    found = _pieces_by(holders, opened, record, box)
    if len(found) == 1 and found[0][1].box == box:  # the usual case
        return found
    report = _proof(found, box)
    if report.gaps and holders != record.writers:
        found = _pieces_by(record.writers, opened, record, box)
        report = _proof(found, box)
    if report.overlaps:
        raise CoverageOverlap(f"array {record.spec.id}: elements {report.overlaps[0][2]} are stored twice")
    if report.gaps:
        raise CoverageGap(f"array {record.spec.id}: elements {report.gaps[0]} are stored nowhere")
    return found


def _proof(found: Sequence[tuple[FragmentColumns, StoredPiece]], box: Box) -> CoverageReport:
    return prove_box_coverage(box, [part for _, piece in found if (part := intersect(piece.box, box)) is not None])


def _holders(opened: Opened, record: ArrayRecord, box: Box) -> tuple[int, ...]:
    """Of an array's writers those that held any of the box, as far as the layout says. A layout that says nothing of writers
    (of a group of some ranks, which counts them anew) leaves gaps, and so does no harm."""
    if record.layout is None or len(record.writers) == 1:
        return record.writers
    layout = opened.manifest.layouts[record.layout]
    mesh = opened.manifest.meshes[layout.mesh]
    try:
        places = places_that_hold(box, shape=record.spec.shape, sizes=mesh.sizes, placements=layout.placements)
    except LayoutUnsupported:
        return record.writers
    held = {mesh.ranks[place] for place in places}
    return tuple(writer for writer in record.writers if writer in held) or record.writers


def _reads_of(want: Wanted, piece: StoredPiece, *, block_nbytes: int) -> tuple[Read, ...]:
    try:
        reads = plan_reads(want.box, [piece], block_nbytes=block_nbytes, itemsize=want.record.spec.type.itemsize)
    except Malformed as error:
        raise Malformed(f"array {want.record.spec.id}: {error.message}") from error
    return tuple(reads)


@dataclass(frozen=True, slots=True)
class Span:
    """`nbytes` at `offset` of a file that belong at `at` of a destination as they are."""

    offset: int
    at: int
    nbytes: int


def span_of(unit: Unit) -> Span | None:
    """All bytes of a unit, if they lie in a row and belong in a row."""
    piece, step = unit.piece, unit.read.steps[0]
    if len(unit.read.steps) > 1 or not isinstance(step, Direct) or piece.row_nbytes not in (piece.row_stride, piece.nbytes):
        return None
    if unit.start < step.source or unit.end > step.source + step.nbytes:
        return None
    return Span(piece.offset + unit.start, step.target + unit.start - step.source, unit.end - unit.start)


def joined(units: Iterable[Unit]) -> tuple[tuple[Unit, ...], ...]:
    """The units in their order, those together that are read at once: at most `UNIT_NBYTES`, of one file and one target."""
    found: list[list[Unit]] = []
    end: Span | None = None  # all of the last ones, None where nothing can follow them
    for unit in units:
        span = span_of(unit)
        if end is not None and span is not None and _follows(found[-1][-1], unit, end, span):
            found[-1].append(unit)
            end = Span(end.offset, end.at, end.nbytes + span.nbytes)
        else:
            found.append([unit])
            end = span
    return tuple(map(tuple, found))


def _follows(last: Unit, unit: Unit, end: Span, span: Span) -> bool:
    return (
        last.target is unit.target
        and (end.offset + end.nbytes, end.at + end.nbytes) == (span.offset, span.at)
        and end.nbytes + span.nbytes <= UNIT_NBYTES
        and last.file == unit.file
    )
