"""Where readers of zarr find the chunks of a packed checkpoint: `references.json`, derived from the records. [UCF-161]

A chunk has a reference if it lies whole in one pack, as FRAG-61 has it; an array is left out if one of its chunks does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from elastickpt.errors import DocumentMismatch, LimitExceeded, Malformed, Unsafe
from elastickpt.format.arrays import Box
from elastickpt.format.canonical_json import dump, parse
from elastickpt.format.documents import documents
from elastickpt.format.keys import REFERENCES, checked_path, chunk_file
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, IndexPart, StoredFile
from elastickpt.layout.grid import chunk_count, chunk_nbytes, chunks_of, runs_of

MAX_ARRAYS = 1_000  # of a checkpoint whose references a save writes
MAX_CHUNKS = 20_000

_ROOT = "{{root}}/"  # before a path: the reader's template for the folder


@dataclass(slots=True)
class _Chunk:
    """What is known of a chunk: the slots in which pieces of it seem to lie, and how many of its elements they have."""

    slots: set[tuple[StoredFile, int] | None] = field(default_factory=set)
    count: int = 0


@dataclass(frozen=True, slots=True)
class References:
    """The text of `references.json`, and the keys of the arrays that are not in it."""

    text: str
    left_out: tuple[str, ...]


def within_limits(arrays: Sequence[ArrayRecord]) -> bool:
    """Whether a save writes references to these arrays. [UCF-162]"""
    if len(arrays) > MAX_ARRAYS:
        return False
    return sum(chunk_count(record.spec.shape, record.chunk_shape) for record in arrays) <= MAX_CHUNKS


def references_of(arrays: Sequence[ArrayRecord], maps: Iterable[FragmentColumns], *, root: str = ".") -> References:
    """The references to all chunks that have one; `arrays` in the order of their keys. `root`: what the reader's template
    is unless he says otherwise."""
    by_key = {record.key: record for record in arrays}
    found: dict[str, dict[tuple[int, ...], _Chunk]] = {key: {} for key in by_key}
    for columns in maps:
        for key, places in columns.pieces.by_array().items():
            for place in places:
                _note(found[key], by_key[key], columns, place)
    entries: dict[str, object] = {}
    whole = []
    for record in arrays:
        chunks = _whole_chunks(record, found[record.key])
        if chunks is not None:
            whole.append(record)
            entries.update(chunks)
    texts: dict[str, object] = {path: data.decode("ascii") for path, data in documents([IndexPart(tuple(whole))])}
    text = dump({"version": 1, "templates": {"root": root}, "refs": texts | entries})
    kept = {record.key for record in whole}
    return References(text, tuple(record.key for record in arrays if record.key not in kept))


def _note(chunks: dict[tuple[int, ...], _Chunk], record: ArrayRecord, columns: FragmentColumns, place: int) -> None:
    piece = columns.pieces.piece(place)
    runs = runs_of(piece.box, shape=record.spec.shape, chunk_shape=record.chunk_shape, itemsize=record.spec.type.itemsize)
    chunk = chunks.setdefault(runs[0].chunk, _Chunk())
    file = columns.files[piece.file]
    base = piece.offset - runs[0].offset
    there = (piece.row_nbytes, piece.row_stride) == (runs[0].row_nbytes, runs[0].row_stride)
    chunk.slots.add((file, base) if len(runs) == 1 and there and file.base == 0 and base >= 0 else None)
    chunk.count += piece.box.count


def _whole_chunks(record: ArrayRecord, chunks: Mapping[tuple[int, ...], _Chunk]) -> dict[str, object] | None:
    """The references to the chunks of an array; None if one lies otherwise."""
    nbytes = chunk_nbytes(record.chunk_shape, itemsize=record.spec.type.itemsize)
    found: dict[str, object] = {}
    whole = Box.whole(record.spec.shape)
    for index, box in chunks_of(whole, shape=record.spec.shape, chunk_shape=record.chunk_shape):
        chunk = chunks.get(index, _Chunk())
        slot = next(iter(chunk.slots)) if len(chunk.slots) == 1 else None
        if slot is None or chunk.count != box.count or slot[1] + nbytes > slot[0].nbytes:
            return None
        found[chunk_file(record.key, index)] = [_ROOT + slot[0].path, slot[1], nbytes]
    return found


def check_references(data: bytes, expected: References) -> Iterator[DocumentMismatch | Unsafe | LimitExceeded]:
    """What is wrong with a file `references.json`, if anything is. [UCF-163, UCF-164]"""
    if data == expected.text.encode("ascii"):
        return
    try:
        found = parse(data, where=REFERENCES)
    except Malformed as error:
        yield DocumentMismatch(error.message)
        return
    except LimitExceeded as error:
        yield error
        return
    refs = found.get("refs") if isinstance(found, dict) else None
    for key, target in refs.items() if isinstance(refs, dict) else ():
        path = target[0] if isinstance(target, list) and target else None
        if isinstance(path, str) and not _is_below(path):
            yield Unsafe(f"{REFERENCES}: {key!r} refers to {path[:200]!r}, which is not below the checkpoint's folder")
            return
    wanted = parse(expected.text, where=REFERENCES)
    if found != wanted:
        keys = [key for key in _keys(found, wanted) if _of(found, key) != _of(wanted, key)]
        where = f"at {keys[0]!r} " if keys else ""
        yield DocumentMismatch(f"{REFERENCES}: differs {where}from what the records say; without it nothing is lost")


def _is_below(path: str) -> bool:
    if not path.startswith(_ROOT):
        return False
    try:
        checked_path(path.removeprefix(_ROOT))
    except (Unsafe, LimitExceeded):
        return False
    return True


def _keys(*values: object) -> Iterator[str]:
    for value in values:
        refs = value.get("refs") if isinstance(value, dict) else None
        yield from refs if isinstance(refs, dict) else ()


def _of(value: object, key: str) -> object:
    refs = value.get("refs") if isinstance(value, dict) else None
    return refs.get(key) if isinstance(refs, dict) else None
