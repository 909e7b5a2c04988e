"""Whether the records of one checkpoint agree: index with manifest, fragment maps with index. [UCF-62..65, FRAG-10..44]

Every reader of pieces calls these before it takes memory for an array: afterwards each piece lies inside one chunk of
its array, has the bytes of its box, and, in placement `plain`, lies where a zarr reader looks for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from elastickpt.errors import LimitExceeded, Malformed
from elastickpt.format.columns import IntColumn
from elastickpt.format.keys import chunk_file
from elastickpt.format.limits import MAX_ARRAYS
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, IndexPart, Manifest

_Faults = Sequence[tuple[str, npt.NDArray[np.bool_]]]


def check_index(parts: Sequence[IndexPart], manifest: Manifest) -> dict[str, ArrayRecord]:
    """key -> array of all parts, in the order of keys; the parts are those that the manifest lists.

    Raises Malformed where first or last key, order or a layout is not what the manifest says; LimitExceeded.
    """
    if sum(len(part.arrays) for part in parts) > MAX_ARRAYS:  # [UCF-96]
        raise LimitExceeded(f"the index has more than {MAX_ARRAYS} arrays")
    for entry, part in zip(manifest.index, parts, strict=True):
        found = (part.arrays[0].key, part.arrays[-1].key) if part.arrays else ("", "")
        if found != (entry.first, entry.last):  # [UCF-63]
            raise Malformed(f"{entry.file.path}: keys {found}, the manifest says {(entry.first, entry.last)}")
    arrays = [record for part in parts for record in part.arrays]
    for low, high in pairwise(arrays):
        if low.key >= high.key:  # [UCF-65]
            raise Malformed(f"index: {high.key!r} after {low.key!r}: keys out of order, or twice")
    for record in arrays:
        if record.layout is not None and record.layout >= len(manifest.layouts):  # [UCF-62]
            raise Malformed(
                f"index: array {record.key!r} has layout {record.layout}, the manifest has {len(manifest.layouts)}"
            )
    return {record.key: record for record in arrays}


def check_fragments(
    fragments: FragmentColumns, records: Mapping[str, ArrayRecord], *, manifest: Manifest, writer: int
) -> None:
    """Passes when the map is that of `writer` and agrees with index and manifest. Raises Malformed.

    The cost is a few passes over the columns, and one name per chunk file.
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
    for place, key in enumerate(fragments.pieces.arrays):
        record = records.get(key)
        if record is None:  # [FRAG-25]
            raise Malformed(f"{where}: array {key!r} is not in the index")
        if int(fragments.pieces.ndims[place]) != len(record.chunk_shape):
            raise Malformed(
                f"{where}: array {key!r} has {fragments.pieces.ndims[place]} axes, "
                f"{len(record.chunk_shape)} in the index"
            )
        at = bisect_left(record.writers, writer)
        if at == len(record.writers) or record.writers[at] != writer:  # [FRAG-26]
            raise Malformed(f"{where}: array {key!r}: the index does not list this writer")
        _check_array(fragments, place, record, where, plain=manifest.placement == "plain")


def check_writers(records: Iterable[ArrayRecord], held: Sequence[Sequence[str]]) -> None:
    """Passes when the index lists no writer without pieces; `held` are the arrays of each writer's map, which passed
    `check_fragments`. Raises Malformed. [FRAG-26]
    """
    arrays = [set(keys) for keys in held]
    for record in records:
        for writer in record.writers:
            if writer >= len(arrays) or record.key not in arrays[writer]:
                raise Malformed(f"index: array {record.key!r} lists writer {writer}, whose map has no piece of it")


def _check_array(fragments: FragmentColumns, place: int, record: ArrayRecord, where: str, *, plain: bool) -> None:
    pieces, ndim = fragments.pieces, len(record.chunk_shape)
    mine = pieces.of_array(place)
    rows = slice(mine.start, mine.stop)
    axes = slice(int(pieces.axis_start[mine.start]), int(pieces.axis_start[mine.stop]))
    start, shape = pieces.start[axes].reshape(len(mine), ndim), pieces.shape[axes].reshape(len(mine), ndim)
    chunk = np.array(record.chunk_shape, dtype=np.int64)
    itemsize = record.spec.type.itemsize
    index = start // chunk
    beyond = start + shape > np.array(record.spec.shape, dtype=np.int64)
    spanning = (start + shape - 1) // chunk != index
    faults = (("reaches beyond the array", _any(beyond)), ("spans several chunks", _any(spanning)))
    _raise(faults, record, mine, where)  # [FRAG-18, FRAG-10]: from here on products stay below the chunk's limit
    nbytes = shape.prod(axis=1) * itemsize
    _raise([("has other bytes than its box", pieces.nbytes[rows] != nbytes)], record, mine, where)  # [FRAG-19]
    if not plain:
        return
    own = np.array([file.base == 0 for file in fragments.files])[pieces.file[rows]]
    offset, row, stride = _geometry(start - index * chunk, shape, record.chunk_shape, itemsize)
    wrong = (pieces.offset[rows] != offset) | (pieces.row_nbytes[rows] != row) | (pieces.row_stride[rows] != stride)
    _raise([("lies at another place than its box", own & wrong)], record, mine, where)  # [FRAG-44]
    _check_files(fragments, record, pieces.file[rows][own], index[own], where)


def _any(axes: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return np.asarray(axes.any(axis=1), dtype=np.bool_)


def _raise(faults: _Faults, record: ArrayRecord, mine: range, where: str) -> None:
    for what, wrong in faults:
        if wrong.any():
            raise Malformed(f"{where}: piece {mine[int(np.argmax(wrong))]} of array {record.key!r} {what}")


def _geometry(
    local: npt.NDArray[np.int64], shape: npt.NDArray[np.int64], chunk: Sequence[int], itemsize: int
) -> tuple[IntColumn, IntColumn, IntColumn]:
    """Offset, row length and row stride of boxes in a C-ordered chunk; row length 0 where one stride does not do.

    From the last axis on a box first grows its row as long as it spans the axes after it (phase 0), then skips axes of
    one element (1), then repeats the row at one stride as long as it spans the axes after (2), then may only have axes
    of one element (3).
    """
    count = len(shape)
    offset = np.zeros(count, dtype=np.int64)
    row = np.full(count, itemsize, dtype=np.int64)
    rows = np.ones(count, dtype=np.int64)
    stride = np.zeros(count, dtype=np.int64)
    phase = np.zeros(count, dtype=np.int64)
    good = np.ones(count, dtype=np.bool_)
    step = itemsize
    for axis in reversed(range(len(chunk))):
        extent, spans = shape[:, axis], shape[:, axis] == chunk[axis]
        offset += local[:, axis] * step
        growing, skipping, repeating, ended = (phase == k for k in range(4))
        row[growing] = (extent * step)[growing]
        begins = skipping & (extent > 1)
        stride[begins] = step
        rows[begins | repeating] *= extent[begins | repeating]
        good &= ~(ended & (extent > 1))
        phase[growing & ~spans] = 1
        phase[begins] = np.where(spans, 2, 3)[begins]
        phase[repeating & ~spans] = 3
        step *= chunk[axis]
    return offset, np.where(good, row, 0), np.where(rows > 1, stride, row)


def _check_files(
    fragments: FragmentColumns, record: ArrayRecord, files: IntColumn, index: npt.NDArray[np.int64], where: str
) -> None:
    nbytes = prod(record.chunk_shape) * record.spec.type.itemsize
    for file, *chunk in np.unique(np.column_stack([files, index]), axis=0).tolist():
        stored, expected = fragments.files[file], chunk_file(record.key, tuple(chunk))
        if stored.path != expected or stored.nbytes != nbytes:  # [FRAG-43]
            raise Malformed(
                f"{where}: a piece of array {record.key!r} lies in {stored.path!r} of {stored.nbytes} bytes, "
                f"expected {expected!r} of {nbytes}"
            )
