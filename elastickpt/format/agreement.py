"""Whether the records of one checkpoint agree: index with manifest, fragment maps with index. [UCF-62..65, FRAG-10..44]

Every reader of pieces calls these before it takes memory for an array: afterwards each piece lies inside one chunk of
its array, has the bytes of its box, and, in placement `plain`, lies where a zarr reader looks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from operator import lt
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from elastickpt.errors import LimitExceeded, Malformed
from elastickpt.format.array_columns import ArrayColumns
from elastickpt.format.keys import array_keys, attempt_of_pack, chunk_file, pack_file
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, IndexPart, Manifest
from elastickpt.format.strict_reading import IntColumn
from elastickpt.format.version import MAX_ARRAYS, PACKS

_Flags: TypeAlias = npt.NDArray[np.bool_]


def check_index(parts: Sequence[IndexPart], manifest: Manifest) -> ArrayColumns:
    """The arrays of all parts, in the order of keys; the parts are those that the manifest lists.

    Raises Malformed where first or last key, order or a layout is not what the manifest says; LimitExceeded.
    """
    if sum(len(part.arrays) for part in parts) > MAX_ARRAYS:  # [UCF-96]
        raise LimitExceeded(f"the index has more than {MAX_ARRAYS} arrays")
    columns = [ArrayColumns.of(part.arrays) for part in parts]
    for entry, part in zip(manifest.index, columns, strict=True):
        found = (part.keys[0], part.keys[-1]) if part.keys else ("", "")
        if found != (entry.first, entry.last):  # [UCF-63]
            raise Malformed(f"{entry.file.path}: keys {found}, the manifest says {(entry.first, entry.last)}")
    arrays = ArrayColumns.together(columns)
    if not all(map(lt, arrays.keys, arrays.keys[1:])):  # [UCF-65]
        low, high = next(two for two in pairwise(arrays.keys) if two[0] >= two[1])
        raise Malformed(f"index: {high!r} after {low!r}: keys out of order, or twice")
    beyond = [one.layout is not None and one.layout >= len(manifest.layouts) for one in arrays.templates]
    for place in np.flatnonzero(np.array(beyond, dtype=np.bool_)[arrays.template])[:1].tolist():  # [UCF-62]
        layout = arrays.templates[arrays.template[place]].layout
        raise Malformed(f"index: array {arrays.keys[place]!r} has layout {layout}, the manifest has {len(manifest.layouts)}")
    return arrays


def check_keys(records: Iterable[ArrayRecord]) -> None:
    """Passes when every key is the one that the names of all arrays give; about 10 µs an array. Raises Malformed.

    Reading does not depend on it, since the index says both; `verify` asks for it. [UCF-35]
    """
    listed = list(records)
    wanted = array_keys(record.spec.id for record in listed)
    for record in listed:
        if record.key != wanted[record.spec.id]:
            raise Malformed(f"index: array {record.spec.id} has key {record.key!r}, expected {wanted[record.spec.id]!r}")


def check_fragments(fragments: FragmentColumns, arrays: ArrayColumns, *, manifest: Manifest, writer: int) -> None:
    """Passes when the map is that of `writer` and agrees with index and manifest in all arrays. Raises Malformed.

    The cost is a few passes over the columns, and one name per chunk file.
    """
    for problem in fragment_problems(fragments, arrays, manifest=manifest, writer=writer).values():
        raise problem


def fragment_problems(
    fragments: FragmentColumns, arrays: ArrayColumns, *, manifest: Manifest, writer: int
) -> Mapping[str, Malformed]:
    """By key, the arrays whose pieces in the map do not agree with index and manifest, and the first thing that is wrong.

    Pieces of the others can be read. Raises Malformed for what concerns all of the map: another writer or attempt, also in the
    name of a pack, or a base that is not there.
    """
    where = f"fragment map of writer {writer}"
    if fragments.writer != writer or fragments.attempt != manifest.attempt:  # [FRAG-21]
        raise Malformed(
            f"{where}: it is of writer {fragments.writer} and attempt {fragments.attempt!r}, "
            f"the manifest's attempt is {manifest.attempt!r}"
        )
    beyond = max((file.base for file in fragments.files), default=0)
    if beyond > len(manifest.bases):  # [FRAG-23]
        raise Malformed(f"{where}: a file in base {beyond}, the manifest has {len(manifest.bases)}")
    _check_packs(fragments, manifest, where)
    pieces = fragments.pieces
    places = arrays.places_of(pieces.arrays)
    problems = _unlike(fragments, arrays, places, writer, where)
    alike = np.ones(len(places), dtype=np.bool_)
    if problems:
        alike = np.array([key not in problems for key in pieces.arrays], dtype=np.bool_)
    for ndim in sorted(set(pieces.ndims[alike].tolist())):
        group = _Group.of(fragments, arrays, np.where(alike & (pieces.ndims == ndim), places, -1), ndim, problems)
        _check_pieces(group, where, plain=manifest.placement == "plain")
    return problems


def _check_packs(fragments: FragmentColumns, manifest: Manifest, where: str) -> None:
    own = pack_file(manifest.attempt, fragments.writer)
    for path in (file.path for file in fragments.files if file.base == 0):
        if attempt_of_pack(path) not in (None, manifest.attempt):  # [FRAG-64]
            raise Malformed(f"{where}: {path!r} is a pack of another attempt, the manifest's is {manifest.attempt!r}")
        if PACKS in manifest.requires and path != own:  # [FRAG-65]
            raise Malformed(f"{where}: a piece in {path!r}, expected this writer's pack {own!r}")


def _unlike(
    fragments: FragmentColumns, arrays: ArrayColumns, places: IntColumn, writer: int, where: str
) -> dict[str, Malformed]:
    """By key, the arrays of a map that are not in the index as the map has them; `places` are those in the index."""
    pieces, problems = fragments.pieces, {}
    if len(places) == 0 or len(arrays) == 0:
        fits = np.zeros(len(places), dtype=np.bool_)
    else:
        fits = (places >= 0) & (arrays.ndims[places] == pieces.ndims) & arrays.lists(writer)[places]
    for own in np.flatnonzero(~fits).tolist():
        key, place = pieces.arrays[own], int(places[own])
        if place < 0:  # [FRAG-25]
            problems[key] = Malformed(f"{where}: array {key!r} is not in the index")
        elif pieces.ndims[own] != arrays.ndims[place]:
            problems[key] = Malformed(
                f"{where}: array {key!r} has {pieces.ndims[own]} axes, {arrays.ndims[place]} in the index"
            )
        else:  # [FRAG-26]
            problems[key] = Malformed(f"{where}: array {key!r}: the index does not list this writer")
    return problems


def check_writers(records: Iterable[ArrayRecord], held: Sequence[Sequence[str]]) -> None:
    """Passes when the index lists no writer without pieces; `held` are the arrays of each writer's map, which passed
    `check_fragments`. Raises Malformed. [FRAG-26]
    """
    arrays = [set(keys) for keys in held]
    for record in records:
        for writer in record.writers:
            if writer >= len(arrays) or record.key not in arrays[writer]:
                raise Malformed(f"index: array {record.key!r} lists writer {writer}, whose map has no piece of it")


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """All pieces of arrays with the same number of axes. `mine` are their places in the columns; the others have one
    row a piece, and one column an axis where they are of the array's or the box's extents.
    """

    fragments: FragmentColumns
    arrays: ArrayColumns
    places: IntColumn  # in `arrays`, by place in the map's; -1 for those of other groups
    problems: dict[str, Malformed]
    mine: IntColumn
    start: IntColumn
    shape: IntColumn
    array_shape: IntColumn
    chunk: IntColumn
    itemsize: IntColumn

    @classmethod
    def of(
        cls, fragments: FragmentColumns, arrays: ArrayColumns, places: IntColumn, ndim: int, problems: dict[str, Malformed]
    ) -> _Group:
        pieces = fragments.pieces
        mine = np.flatnonzero(places[pieces.array] >= 0)
        axes = pieces.axis_start[mine][:, None] + np.arange(ndim)
        own = places[pieces.array[mine]]
        boxes = (pieces.start[axes], pieces.shape[axes])
        return cls(fragments, arrays, places, problems, mine, *boxes, *arrays.axes(own, ndim), arrays.itemsize[own])

    def refuse_if(self, wrong: _Flags, what: str, where: str) -> None:
        """Of each array with pieces that are wrong the first one is named, unless something was found before."""
        for piece in self.mine[wrong].tolist():
            key = self.fragments.pieces.arrays[int(self.fragments.pieces.array[piece])]
            if key not in self.problems:
                self.problems[key] = Malformed(f"{where}: piece {piece} of array {key!r} {what}")


def _check_pieces(group: _Group, where: str, *, plain: bool) -> None:
    pieces, mine = group.fragments.pieces, group.mine
    index = group.start // group.chunk
    group.refuse_if(_any(group.start + group.shape > group.array_shape), "reaches beyond the array", where)  # [FRAG-18]
    last = (group.start + group.shape - 1) // group.chunk
    group.refuse_if(_any(last != index), "spans several chunks", where)  # [FRAG-10]: products stay below its limit
    nbytes = group.shape.prod(axis=1) * group.itemsize
    group.refuse_if(pieces.nbytes[mine] != nbytes, "has other bytes than its box", where)  # [FRAG-19]
    if not plain:
        return
    files = pieces.file[mine]
    own = np.array([file.base == 0 for file in group.fragments.files], dtype=np.bool_)[files]
    offset, row, stride = _geometry(group.start - index * group.chunk, group)
    wrong = (pieces.offset[mine] != offset) | (pieces.row_nbytes[mine] != row) | (pieces.row_stride[mine] != stride)
    group.refuse_if(own & wrong, "lies at another place than its box", where)  # [FRAG-44]
    _check_files(group, np.column_stack([pieces.array[mine], files, index])[own], where)


def _any(axes: _Flags) -> _Flags:
    return np.asarray(axes.any(axis=1), dtype=np.bool_)


def _geometry(local: IntColumn, group: _Group) -> tuple[IntColumn, IntColumn, IntColumn]:
    """Offset, row length and row stride of boxes in their C-ordered chunks; row length 0 where one stride does not do.

    From the last axis on a box first grows its row as long as it spans the axes after it (phase 0), then skips axes of
    one element (1), then repeats the row at one stride as long as it spans the axes after (2), then may only have axes
    of one element (3).
    """
    count = len(group.mine)
    offset, stride, phase = (np.zeros(count, dtype=np.int64) for _ in range(3))
    rows, good = np.ones(count, dtype=np.int64), np.ones(count, dtype=np.bool_)
    row, step = group.itemsize.copy(), group.itemsize.copy()
    for axis in reversed(range(local.shape[1])):
        extent, spans = group.shape[:, axis], group.shape[:, axis] == group.chunk[:, axis]
        offset += local[:, axis] * step
        growing, skipping, repeating, ended = (phase == k for k in range(4))
        row[growing] = (extent * step)[growing]
        begins = skipping & (extent > 1)
        stride[begins] = step[begins]
        rows[begins | repeating] *= extent[begins | repeating]
        good &= ~(ended & (extent > 1))
        phase[growing & ~spans] = 1
        phase[begins] = np.where(spans, 2, 3)[begins]
        phase[repeating & ~spans] = 3
        step *= group.chunk[:, axis]
    return offset, np.where(good, row, 0), np.where(rows > 1, stride, row)


def _check_files(group: _Group, places: IntColumn, where: str) -> None:
    """`places`: array, file and chunk of each piece; pieces of one chunk that follow each other are looked at once."""
    changes = _any(np.diff(places, axis=0, prepend=places[:1] - 1) != 0)
    for array, file, *chunk in places[changes].tolist():
        key, stored = group.fragments.pieces.arrays[array], group.fragments.files[file]
        if key in group.problems:
            continue
        like = group.arrays.templates[group.arrays.template[group.places[array]]]
        expected = chunk_file(key, tuple(chunk))
        nbytes = prod(like.chunk_shape) * like.itemsize
        if stored.path != expected or stored.nbytes != nbytes:  # [FRAG-43]
            group.problems[key] = Malformed(
                f"{where}: a piece of array {key!r} lies in {stored.path!r} of {stored.nbytes} bytes, "
                f"expected {expected!r} of {nbytes}"
            )
