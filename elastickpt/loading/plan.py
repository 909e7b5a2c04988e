"""What a load will read: decided, and held against the fragment maps and the files, before the first byte is filled.

wanted boxes --> pieces of the fragment maps --> stretches: what lies in a row on both sides, in columns (loading.stretches)
                                              `-> reads (layout.reads) --> units: the rest
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from elastickpt.errors import CoverageGap, CoverageOverlap, Damaged, LayoutUnsupported, Malformed, MissingFile, WrongLength
from elastickpt.format.arrays import Box
from elastickpt.format.piece_columns import FragmentColumns, distinct
from elastickpt.format.records import ArrayRecord, StoredFile, StoredPiece
from elastickpt.format.strict_reading import IntColumn
from elastickpt.layout.algebra import CoverageReport, intersect, prove_box_coverage
from elastickpt.layout.placement import places_that_hold
from elastickpt.layout.reads import Direct, Read, plan_reads
from elastickpt.loading.box_parts import Boxes, BoxParts
from elastickpt.loading.opened import Opened
from elastickpt.loading.stretches import Stretches, number_files, repeated, whole_pieces
from elastickpt.loading.targets import ReadTarget, Targets, Wanted, WantedColumns

UNIT_NBYTES = 1 << 20

FoundPiece = tuple[FragmentColumns, int, StoredPiece]  # a piece, with its map and its number in it


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Some blocks of one read that are no stretch: bytes [start, end) of a piece, and what they deliver to `target`.

    At most `UNIT_NBYTES` of whole blocks where it can be cut, so that a block is hashed while it is still in the cache.
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
    """What lies in a row on both sides, in columns, and the rest as units. Making it has read records only, and filled nothing.

    `files` are those of the stretches, `file` the number of each stretch's.
    """

    targets: Targets
    maps: tuple[FragmentColumns, ...]
    stretches: Stretches
    files: tuple[StoredFile, ...]
    file: IntColumn
    units: tuple[Unit, ...]


def plan_fetch(opened: Opened, wanted: Sequence[Wanted], columns: Sequence[WantedColumns] = ()) -> FetchPlan:
    """How every destination will be filled. Reads the fragment maps that it needs; blocking.

    Raises Damaged kinds naming the map, or the array with a gap or overlap, StorageFailed kinds for what cannot be read.
    """
    return _Planning(opened, Targets(opened.arrays, wanted, columns)).run()


class _Planning:
    """One call of `plan_fetch`: what is one stored piece is found in columns, the others one by one."""

    def __init__(self, opened: Opened, targets: Targets) -> None:
        self._opened = opened
        self._targets = targets
        self._maps: dict[FragmentColumns, int] = {}
        self._rows: list[tuple[int, int, int, int, int, int, int, int]] = []
        self._units: list[Unit] = []
        self._boxes = Boxes.of(targets.boxes)
        self._ndims = self._boxes.ndims

    def run(self) -> FetchPlan:
        numbers = np.flatnonzero(self._targets.nbytes)
        holders, groups = self._grouped(numbers)
        alone = np.array([one[0] if len(one) == 1 else -1 for one in holders], dtype=np.int64)[groups]  # who alone holds each
        whole, left = [], numbers[alone < 0].tolist()
        for writer in distinct(alone[alone >= 0])[0].tolist():
            found, rest = self._whole(writer, numbers[alone == writer])
            whole.append(found)
            left += rest
        others = np.array(sorted(left), dtype=np.int64)
        parts, rest = self._in_parts(others, holders, groups[np.searchsorted(numbers, others)])
        for number in rest:
            self._pieces_of(number)
        maps = tuple(self._maps)
        stretches = Stretches.together([*whole, parts, Stretches.of(self._rows)])
        return FetchPlan(self._targets, maps, stretches, *number_files(maps, stretches), tuple(self._units))

    def _grouped(self, numbers: IntColumn) -> tuple[Sequence[tuple[int, ...]], IntColumn]:
        """Groups of targets that are alike in their writers, layout, shape and box: for each the writers that hold any of it,
        as `_holders` says; and the group of each target."""
        arrays, targets = self._opened.arrays, self._targets
        place, box = targets.place[numbers], targets.box[numbers]
        alike = (arrays.writers[place] * len(arrays.templates) + arrays.template[place]) * len(targets.boxes) + box
        _, first, group = distinct(alike)
        known: dict[tuple[tuple[int, ...], int | None, tuple[int, ...], Box], tuple[int, ...]] = {}
        holders = []
        for at in first.tolist():
            layout = arrays.templates[arrays.template[place[at]]].layout
            kind = arrays.writer_sets[arrays.writers[place[at]]], layout, arrays.shapes[place[at]], targets.boxes[box[at]]
            if kind not in known:
                known[kind] = _holders(self._opened, *kind)
            holders.append(known[kind])
        return holders, group

    def _whole(self, writer: int, numbers: IntColumn) -> tuple[Stretches, list[int]]:
        """What is one piece of this writer and lies in a row; and the numbers of what is not."""
        targets, place = self._targets, self._targets.place[numbers]
        columns, first, count = self._opened.numbers(writer)
        single = (count[place] == 1) & (self._ndims[targets.box[numbers]] == self._opened.arrays.ndims[place])
        rest, mine = numbers[~single], numbers[single]  # what is wrong with one is said by who looks at it alone
        which, axis = repeated(self._ndims[targets.box[mine]])
        box = targets.box[mine][which]
        axes = self._boxes.start[box, axis], self._boxes.shape[box, axis]
        found, left = self._stretches(columns, first[targets.place[mine]], axes, targets.nbytes[mine], mine)
        return found, rest.tolist() + left

    def _stretches(
        self,
        columns: FragmentColumns,
        pieces: IntColumn,
        axes: tuple[IntColumn, IntColumn],
        nbytes: IntColumn,
        numbers: IntColumn,
    ) -> tuple[Stretches, list[int]]:
        """Pieces that are boxes, of these `axes` (starts and extents), and lie in a row; the numbers of those that do not."""
        fits = whole_pieces(columns, pieces, *axes, nbytes)
        rest = np.delete(numbers, fits).tolist() if len(fits) < len(numbers) else []
        zeros, end = np.zeros(len(fits), dtype=np.int64), nbytes[fits]
        own = (zeros + self._number(columns), pieces[fits], zeros, end, zeros, end, numbers[fits], zeros)
        return Stretches.in_a_row(*own), rest

    def _in_parts(
        self, numbers: IntColumn, holders: Sequence[tuple[int, ...]], groups: IntColumn
    ) -> tuple[Stretches, list[int]]:
        """What is rows, or parts of rows, of several pieces that lie in a row; and the numbers of what is not. The target at
        each place is of a group, whose `holders` hold it."""
        if not len(numbers):
            return Stretches.of(()), []
        places, box = self._targets.place[numbers], self._targets.box[numbers]
        order = np.argsort(groups, kind="stable")
        bounds = np.searchsorted(groups[order], np.arange(len(holders) + 1)).tolist()
        by_writer: dict[int, list[IntColumn]] = {}
        for (low, high), among in zip(pairwise(bounds), holders, strict=True):
            for writer in among if low < high else ():
                by_writer.setdefault(writer, []).append(order[low:high])
        parts = BoxParts(self._boxes.take(box))
        parts.odd |= self._ndims[box] != self._opened.arrays.ndims[places]
        for writer, of in by_writer.items():
            columns, first, count = self._opened.numbers(writer)
            mine = np.sort(np.concatenate(of))
            counts = count[places[mine]]
            parts.odd[mine[counts == 0]] = True  # what is wrong with it is said by who looks at it alone
            which, inside = repeated(counts)
            parts.add(self._number(columns), columns, first[places[mine]][which] + inside, mine[which])
        found, held = parts.proven()
        return found.of_targets(numbers[found.target]), numbers[~held].tolist()

    def _number(self, columns: FragmentColumns) -> int:
        return self._maps.setdefault(columns, len(self._maps))

    def _pieces_of(self, number: int) -> None:
        target = self._targets[number]
        want = target.wanted
        for columns, place, piece in require_stored(self._opened, want.record, want.box):
            for read in _reads_of(want, piece, block_nbytes=columns.block_nbytes):
                step = read.steps[0]
                if isinstance(step, Direct) and len(read.steps) == 1 and piece.row_nbytes in (piece.row_stride, piece.nbytes):
                    own = self._number(columns)
                    low, high = max(step.source, read.start), min(step.source + step.nbytes, read.end)
                    self._rows.append((own, place, read.start, read.end, low, high, number, step.target + low - step.source))
                else:
                    self._units += _units(columns, piece, read, target)


def _units(columns: FragmentColumns, piece: StoredPiece, read: Read, target: ReadTarget) -> Iterator[Unit]:
    step = max(UNIT_NBYTES // columns.block_nbytes, 1) * columns.block_nbytes
    if not isinstance(read.steps[0], Direct) or len(read.steps) > 1:
        step = read.nbytes
    for low in range(read.start, read.end, step):
        end = min(low + step, read.end)
        yield Unit(columns.files[piece.file], piece, columns.block_nbytes, low, end, read, target)


def require_files(opened: Opened, plan: FetchPlan) -> None:
    """Raises MissingFile or WrongLength, naming an array in it, unless every file of the plan is there and whole."""
    for file, array in _an_array_of_each(plan):
        try:
            nbytes = opened.store.size(opened.where(file))
        except MissingFile:
            raise MissingFile(
                f"{opened.where(file)}: expected {file.nbytes} bytes (in the fragment map), found no such file; "
                f"it holds array {array().spec.id}"
            ) from None
        except Damaged as error:
            raise type(error)(f"{error.message}; it holds array {array().spec.id}") from error
        require_length(file, nbytes, array)


def _an_array_of_each(plan: FetchPlan) -> Iterator[tuple[StoredFile, Callable[[], ArrayRecord]]]:
    files, first, _ = distinct(plan.file)
    numbers = plan.stretches.target[first].tolist()
    for file, number in zip(files.tolist(), numbers, strict=True):
        yield plan.files[file], partial(plan.targets.record_of, number)
    of_units: dict[StoredFile, ArrayRecord] = {}
    for unit in plan.units:
        of_units.setdefault(unit.file, unit.target.wanted.record)
    for unit_file in of_units:
        if unit_file not in plan.files:
            yield unit_file, partial(of_units.__getitem__, unit_file)


def require_length(file: StoredFile, nbytes: int, array: Callable[[], ArrayRecord]) -> None:
    """Raises WrongLength unless a file, which holds some of an array, has the recorded size."""
    if nbytes != file.nbytes:
        raise WrongLength(
            f"{file.path}: expected {file.nbytes} bytes (in the fragment map), found {nbytes}; it holds array {array().spec.id}"
        )


def _pieces_by(writers: Sequence[int], opened: Opened, record: ArrayRecord, within: Box) -> list[FoundPiece]:
    """The pieces that these writers stored of an array and that hold any of `within`."""
    found: list[FoundPiece] = []
    for writer in writers:
        columns, places = opened.pieces(writer, record.key)
        for place in places:
            box = columns.pieces.box(place)
            if box == within or intersect(box, within) is not None:
                found.append((columns, place, columns.pieces.piece_of(place, box)))
    return found


def require_stored(opened: Opened, record: ArrayRecord, box: Box) -> list[FoundPiece]:
    """The pieces that hold a box of an array. Raises CoverageGap or CoverageOverlap unless they hold every element of it
    exactly once. [FRAG-30, FRAG-31]

    Maps of writers that by the layout held nothing of it are not read, unless the others leave a gap. [FRAG-35]
    """
    holders = _holders(opened, record.writers, record.layout, record.spec.shape, box)
    found = _pieces_by(holders, opened, record, box)
    if len(found) == 1 and found[0][2].box == box:  # the usual case
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


def _proof(found: Sequence[FoundPiece], box: Box) -> CoverageReport:
    return prove_box_coverage(box, [part for _, _, piece in found if (part := intersect(piece.box, box)) is not None])


def _holders(opened: Opened, writers: tuple[int, ...], layout: int | None, shape: tuple[int, ...], box: Box) -> tuple[int, ...]:
    """Of an array's writers those that held any of the box, as far as the layout says. A layout that says nothing of writers
    (of a group of some ranks, which counts them anew) leaves gaps, and so does no harm."""
    if layout is None or len(writers) == 1:
        return writers
    how = opened.manifest.layouts[layout]
    mesh = opened.manifest.meshes[how.mesh]
    try:
        places = places_that_hold(box, shape=shape, sizes=mesh.sizes, placements=how.placements)
    except LayoutUnsupported:
        return writers
    held = {mesh.ranks[place] for place in places}
    return tuple(writer for writer in writers if writer in held) or writers


def _reads_of(want: Wanted, piece: StoredPiece, *, block_nbytes: int) -> tuple[Read, ...]:
    try:
        itemsize = want.record.spec.type.itemsize
        reads = plan_reads(want.box, [piece], block_nbytes=block_nbytes, itemsize=itemsize, scatter_nbytes=UNIT_NBYTES)
    except Malformed as error:
        raise Malformed(f"array {want.record.spec.id}: {error.message}") from error
    return tuple(reads)
