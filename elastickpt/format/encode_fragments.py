"""Fragment maps on disk: one msgpack map a writer, its pieces in integer columns. [FRAG-20..28]"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from elastickpt.errors import CheckpointError, LimitExceeded, Malformed, Unsafe, Unsupported
from elastickpt.format.canonical_json import dump_bounded, parse
from elastickpt.format.decode_values import decode_pointers
from elastickpt.format.encode_values import encode_pointers
from elastickpt.format.keys import PACKS, checked_paths
from elastickpt.format.piece_columns import FragmentColumns, PieceColumns, columns_of, distinct, starts
from elastickpt.format.records import FORMAT_VERSION, FragmentMap, OptimizerTable, StoredFile
from elastickpt.format.strict_reading import IntColumn, StrictObject, pack, pack_ints, take_ints, take_uints, text, unpack
from elastickpt.format.tables import pack_tables, take_tables
from elastickpt.format.values import Value
from elastickpt.format.version import (
    MAX_BLOCK_NBYTES,
    MAX_DIM,
    MAX_FILE_NBYTES,
    MAX_FRAGMENTS_NBYTES,
    MAX_NDIM,
    MAX_WRITERS,
    MIN_BLOCK_NBYTES,
    MIN_PACK_BLOCK_NBYTES,
)

FORMAT = "elastickpt-fragments"


def encode_fragments(fragments: FragmentMap | FragmentColumns) -> bytes:
    """The bytes of a writer's fragment file. Pieces are put in the order of their arrays' keys. Raises ValueNotCarried.

    What stands in the columns is not checked here; a reader refuses what does not hold together.
    """
    pieces = fragments.pieces if isinstance(fragments.pieces, PieceColumns) else columns_of(fragments.pieces)
    record: dict[str, object] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "writer": fragments.writer,
        "attempt": fragments.attempt,
        "block_nbytes": fragments.block_nbytes,
        "arrays": list(pieces.arrays),
        "ndims": pack_ints(pieces.ndims),
        "files": {
            "base": pack_ints([file.base for file in fragments.files]),
            "path": [file.path for file in fragments.files],
            "nbytes": pack_ints([file.nbytes for file in fragments.files]),
        },
        "pieces": {
            "array": pack_ints(pieces.array),
            "file": pack_ints(pieces.file),
            "offset": pack_ints(pieces.offset),
            "nbytes": pack_ints(pieces.nbytes),
            "row_nbytes": pack_ints(pieces.row_nbytes),
            "row_stride": pack_ints(pieces.row_stride),
            "start": pack_ints(pieces.start),
            "shape": pack_ints(pieces.shape),
        },
        "checksums": np.ascontiguousarray(pieces.checksums, dtype="<u8").tobytes(),
        "tables": pack_tables(fragments.tables),
        "values": _values_text(fragments.values),
    }
    data = pack(record)
    if len(data) > MAX_FRAGMENTS_NBYTES:  # [UCF-90]
        raise LimitExceeded(f"fragment map of writer {fragments.writer}: {len(data)} bytes")
    return data


def _values_text(values: Value) -> str | None:
    where = "per-rank values"
    return None if values is None else dump_bounded(encode_pointers(values, where=where), where=where)


def encode_beside(tables: tuple[OptimizerTable, ...], values: Value) -> bytes:
    """What a writer contributes to its fragment file beside pieces, for another process. Raises ValueNotCarried."""
    return pack({"tables": pack_tables(tables), "values": _values_text(values)})


def decode_beside(data: bytes, *, path: str) -> tuple[tuple[OptimizerTable, ...], Value]:
    """What `encode_beside` encoded. `path` is for messages."""
    members = unpack(data, path=path)
    return take_tables(members, "tables"), _values(members)


def decode_fragments(data: bytes, *, path: str) -> FragmentMap:
    """The fragment map as objects, one a piece: for maps of up to about 10^5 pieces. Raises as `decode_columns`."""
    columns = decode_columns(data, path=path)
    return FragmentMap(
        columns.writer,
        columns.attempt,
        columns.block_nbytes,
        columns.files,
        columns.pieces.objects(),
        columns.tables,
        columns.values,
    )


def decode_columns(data: bytes, *, path: str) -> FragmentColumns:
    """The fragment map in columns, everything checked that can be without the index. `path` is for messages.

    Raises LimitExceeded, Unsupported, Malformed or Unsafe.
    """
    if len(data) > MAX_FRAGMENTS_NBYTES:
        raise LimitExceeded(f"{path}: {len(data)} bytes, the limit is {MAX_FRAGMENTS_NBYTES}")
    members = unpack(data, path=path)
    check_version(members, FORMAT)
    block_nbytes = members.integer("block_nbytes", low=MIN_PACK_BLOCK_NBYTES, high=MAX_BLOCK_NBYTES)
    if block_nbytes & (block_nbytes - 1):  # [FRAG-22]
        raise Malformed(f"{path}/block_nbytes: {block_nbytes} is no power of two")
    files = _files(members.members("files"))
    if block_nbytes < MIN_BLOCK_NBYTES and not any(file.path.startswith(f"{PACKS}/") for file in files):  # [FRAG-67]
        first = f"its first file is {files[0].path!r}" if files else "it names no file"
        raise Malformed(
            f"{path}/block_nbytes: expected at least {MIN_BLOCK_NBYTES} where no file is this writer's pack, found "
            f"{block_nbytes}; {first}"
        )
    fragments = FragmentColumns(
        writer=_writer(members),
        attempt=members.text("attempt"),
        block_nbytes=block_nbytes,
        files=files,
        pieces=_pieces(members, files, block_nbytes),
        tables=take_tables(members, "tables"),
        values=_values(members),
    )
    members.close()
    return fragments


def _writer(members: StrictObject) -> int:
    writer = members.integer("writer")
    if writer >= MAX_WRITERS:  # [UCF-96]
        raise LimitExceeded(f"{members.where}: writer {writer}, the limit is {MAX_WRITERS}")
    return writer


def check_version(members: StrictObject, name: str) -> None:
    """Takes `format` and `version`. Raises Malformed for another record, Unsupported for another version. [UCF-72]"""
    found = members.text("format")
    if found != name:
        raise Malformed(f"{members.where}: format {found!r}, expected {name!r}")
    version = members.integer("version")
    if version != FORMAT_VERSION:
        raise Unsupported(f"{members.where}: format version {version}; this release reads version {FORMAT_VERSION}")


def _values(members: StrictObject) -> Value:
    value = members.take("values")
    where = f"{members.where}/values"
    return None if value is None else decode_pointers(parse(text(value, where=where), where=where), where=where)


def _paths(members: StrictObject, name: str) -> tuple[str, ...]:
    try:
        return tuple(checked_paths(members.texts(name)))  # [UCF-38]
    except (Unsafe, LimitExceeded) as error:
        raise type(error)(f"{members.where}: {error.message}") from None


def _files(members: StrictObject) -> tuple[StoredFile, ...]:
    paths = _paths(members, "path")
    base = take_ints(members, "base", length=len(paths)).tolist()
    nbytes = take_ints(members, "nbytes", length=len(paths), high=MAX_FILE_NBYTES).tolist()
    members.close()
    files = tuple(StoredFile(b, p, n) for b, p, n in zip(base, paths, nbytes, strict=True))
    if len({(file.base, file.path) for file in files}) != len(files):  # [FRAG-23]
        raise Malformed(f"{members.where}: a file stands twice in the table")
    return files


def _arrays(members: StrictObject) -> tuple[tuple[str, ...], IntColumn]:
    keys = _paths(members, "arrays")
    if any(low >= high for low, high in pairwise(keys)):  # [FRAG-24]
        raise Malformed(f"{members.where}/arrays: keys out of order, or twice")
    ndims = take_ints(members, "ndims", length=len(keys))
    if ndims.size and int(ndims.max()) > MAX_NDIM:  # [UCF-93]
        raise LimitExceeded(f"{members.where}/ndims: an array of {ndims.max()} axes, the limit is {MAX_NDIM}")
    return keys, ndims


def _pieces(members: StrictObject, files: tuple[StoredFile, ...], block_nbytes: int) -> PieceColumns:
    keys, ndims = _arrays(members)
    columns = members.members("pieces")
    array = take_ints(columns, "array", high=len(keys) - 1)
    count = len(array)
    axis_start = starts(ndims[array])
    nbytes = take_ints(columns, "nbytes", length=count, low=1, high=MAX_FILE_NBYTES)
    blocks = -(-nbytes // block_nbytes)
    if count and int(blocks.max()) > MAX_FRAGMENTS_NBYTES // 8:  # so that no sum below can overflow
        raise Malformed(f"{members.where}: a piece of {int(nbytes.max())} bytes has more checksums than fit this file")
    checksum_start = starts(blocks)
    pieces = PieceColumns(
        arrays=keys,
        ndims=ndims,
        array=array,
        file=take_ints(columns, "file", length=count, high=len(files) - 1),
        offset=take_ints(columns, "offset", length=count, high=MAX_FILE_NBYTES),
        nbytes=nbytes,
        row_nbytes=take_ints(columns, "row_nbytes", length=count, low=1, high=MAX_FILE_NBYTES),
        row_stride=take_ints(columns, "row_stride", length=count, low=1, high=MAX_FILE_NBYTES),
        start=take_ints(columns, "start", length=int(axis_start[-1]), high=MAX_DIM),
        shape=take_ints(columns, "shape", length=int(axis_start[-1]), low=1, high=MAX_DIM),
        axis_start=axis_start,
        checksums=take_uints(members, "checksums", length=int(checksum_start[-1])),
        checksum_start=checksum_start,
    )
    columns.close()
    _check_pieces(pieces, files, members.where)
    if len(distinct(array)[0]) != len(keys):  # [FRAG-28]
        raise Malformed(f"{members.where}/arrays: an array without a piece")
    return pieces


def _check_pieces(pieces: PieceColumns, files: tuple[StoredFile, ...], where: str) -> None:
    file_nbytes = np.array([file.nbytes for file in files], dtype=np.int64)[pieces.file]
    rows = pieces.nbytes // pieces.row_nbytes
    room = file_nbytes - pieces.offset - pieces.row_nbytes
    faults = (
        ("its array comes before the previous piece's", np.diff(pieces.array, prepend=pieces.array[:1]) < 0),
        ("it is no whole number of rows", pieces.nbytes % pieces.row_nbytes != 0),
        ("its rows overlap", pieces.row_stride < pieces.row_nbytes),
        ("it is one row with a stride of its own", (rows == 1) & (pieces.row_stride != pieces.nbytes)),
        ("its rows have no gap and should be one", (rows > 1) & (pieces.row_stride == pieces.row_nbytes)),
        ("it ends beyond the end of its file", (room < 0) | ((rows - 1) > np.maximum(room, 0) // pieces.row_stride)),
        ("its box ends beyond 2^48", _any_by_piece(pieces, pieces.start + pieces.shape > MAX_DIM)),
    )
    for what, wrong in faults:  # [FRAG-11..16, FRAG-27]
        if wrong.any():
            piece = int(np.argmax(wrong))
            file, key = files[int(pieces.file[piece])], pieces.arrays[int(pieces.array[piece])]
            raise Malformed(
                f"{where}: piece {piece} of array {key!r}, {pieces.nbytes[piece]} bytes from {pieces.offset[piece]} on in "
                f"{file.path!r} of {file.nbytes}: {what}"
            )


def _any_by_piece(pieces: PieceColumns, axes: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    found = np.zeros(len(pieces), dtype=np.bool_)
    wrong = np.flatnonzero(axes)
    found[np.searchsorted(pieces.axis_start, wrong, side="right") - 1] = True
    return found


# -- the map of the next save ------------------------------------------------------------------------------------------

_CHECKSUMS, _TABLES, _TWO = b"\xa9checksums", b"\xa6tables", b"\x82"  # members in msgpack, and the beginning of a map of two


@dataclass(frozen=True, slots=True, eq=False)
class KnownFragments:
    """A map that was decoded, for that of the next save, which differs in attempt and checksums, and in what optimizers and
    ranks hold beside arrays, if the structure is the same. `head` and `tail` are its bytes around the checksums."""

    columns: FragmentColumns
    head: bytes
    tail: bytes

    @classmethod
    def of(cls, columns: FragmentColumns, data: bytes) -> KnownFragments | None:
        """None where its bytes do not stand in the order in which they are written, or hold the attempt's id elsewhere too."""
        sums = np.ascontiguousarray(columns.pieces.checksums, dtype="<u8").tobytes()
        at = data.find(sums, data.rfind(_CHECKSUMS))
        head, tail = data[:at], data[at + len(sums) :]
        known = cls(columns, head, tail)
        found = sums and at >= 0 and tail.startswith(_TABLES)
        return known if found and head.count(columns.attempt.encode()) == known._ids else None

    @property
    def nbytes(self) -> int:
        """Of the bytes that it keeps."""
        return len(self.head) + len(self.tail)

    @property
    def _ids(self) -> int:
        """How often the attempt's id stands in the head: once by itself, and in names of files."""
        attempt = self.columns.attempt
        return 1 + sum(file.path.count(attempt) for file in self.columns.files)

    def next(self, data: bytes, *, attempt: str, path: str) -> FragmentColumns | None:
        """What `decode_columns` makes of the map of another attempt; None where that must be asked, and may refuse it."""
        known, count = self.columns, 8 * len(self.columns.pieces.checksums)
        head, tail = data[: len(self.head)], data[len(self.head) + count :]
        new, old = attempt.encode(), known.attempt.encode()
        if len(new) != len(old) or head.count(new) != self._ids or head.replace(new, old) != self.head:
            return None
        if not tail.startswith(_TABLES):
            return None
        tables, values = known.tables, known.values
        if tail != self.tail:
            try:
                tables, values = decode_beside(_TWO + tail, path=path)
            except CheckpointError:
                return None
        sums = np.frombuffer(data, dtype="<u8", offset=len(head), count=count // 8).astype(np.uint64, copy=False)
        files = tuple(replace(file, path=file.path.replace(known.attempt, attempt)) for file in known.files)
        pieces = replace(known.pieces, checksums=sums)
        return replace(known, attempt=attempt, files=files, pieces=pieces, tables=tables, values=values)
