"""Folders of `torch.distributed.checkpoint`: `.metadata`, a pickle, says what lies where in the `.distcp` files. [FOR-60..66]

Every item of a `.distcp` file is a whole file of torch.save. The paths of `planner_data` cut the keys apart, dots do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import gt

from elastickpt.errors import (
    CoverageGap,
    CoverageOverlap,
    LimitExceeded,
    Malformed,
    MissingFile,
    StructureConflict,
    Unsafe,
    Unsupported,
)
from elastickpt.foreign.folder import Folder, inside
from elastickpt.foreign.listing import FilePiece, ForeignCheckpoint, StoredTensor
from elastickpt.foreign.nested import ChunkedTensor, Path, Tensor, sort_out
from elastickpt.foreign.pickle_machine import MAX_PICKLE_NBYTES, read_pickle
from elastickpt.foreign.pickle_names import NAMES
from elastickpt.foreign.pickle_values import ElementType, Instance, shown
from elastickpt.foreign.plain_values import constants_among
from elastickpt.foreign.torch_file import read_torch_file
from elastickpt.foreign.zip_records import ByteRange
from elastickpt.format.arrays import Box, dtype_named
from elastickpt.layout.algebra import prove_coverage

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint"


@dataclass(frozen=True, slots=True)
class _Place:
    file: str
    offset: int
    nbytes: int


def read_dcp(folder: Folder) -> ForeignCheckpoint:
    """All items of a folder. Raises MissingFile for an absent file, Unsafe for one outside the folder, CoverageGap and
    CoverageOverlap for chunks that do not make a whole, Unsupported for files that a transform wrote.
    """
    metadata = _fields(_metadata(folder), f"{_MODULE}.metadata.Metadata")
    keys = metadata.get("state_dict_metadata")
    if not isinstance(keys, dict):
        raise Malformed(f"{METADATA}: expected the mapping state_dict_metadata")
    places = dict(_places(metadata.get("storage_data")))
    missing = {place.file for place in places.values()} - folder.names()
    if any("/" not in name for name in missing):
        raise MissingFile(f"{METADATA} names the file {min(missing)}, which is not there")
    files = _Files(folder, places)
    try:
        leaves = [(_path(key, metadata.get("planner_data")), files.leaf(key, one)) for key, one in keys.items()]
    finally:
        files.close()
    found = sort_out(_nest(leaves), folder.read_tensor, where=METADATA)
    step = found.values.get("/step", found.values.get("/iteration"))
    return ForeignCheckpoint(
        format="dcp",
        folder=folder.url,
        files=(folder.file(METADATA), *(folder.file(name) for name in sorted({place.file for place in places.values()}))),
        step=step if type(step) is int else None,
        wholes=tuple(found.wholes),
        scalars=tuple(found.scalars),
        groups=tuple(found.groups),
        tied=tuple(found.tied),
        constants=constants_among(found.values),
        values=found.values,
        not_carried=tuple(found.not_carried),
    )


def _metadata(folder: Folder) -> object:
    with folder.opened(METADATA) as file:
        if file.nbytes > MAX_PICKLE_NBYTES:
            raise LimitExceeded(f"{METADATA}: {file.nbytes} bytes, the limit is {MAX_PICKLE_NBYTES}")
        return read_pickle(file.read(0, file.nbytes), names=NAMES, persistent=_no_storage, where=METADATA)


def _no_storage(_: object) -> object:
    raise Unsafe(f"{METADATA}: it needs a persistent object, which no such file has")


def _fields(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, Instance) or value.name != name:
        raise Malformed(f"{METADATA}: expected {name}, found {shown(value)}")
    return value.fields()


def _places(found: object) -> Iterator[tuple[tuple[str, tuple[int, ...]], _Place]]:
    """Where each item lies: by key, and for a chunk by its offsets; a value has none."""
    if not isinstance(found, dict):
        raise Malformed(f"{METADATA}: expected the mapping storage_data (a folder that a planner of another kind wrote?)")
    for index, info in found.items():
        at = _fields(index, f"{_MODULE}.metadata.MetadataIndex")
        place = _fields(info, f"{_MODULE}.filesystem._StorageInfo")
        key, offsets = at.get("fqn"), at.get("offset")
        path, offset, nbytes = place.get("relative_path"), place.get("offset"), place.get("length")
        if not isinstance(key, str) or not isinstance(path, str) or type(offset) is not int or type(nbytes) is not int:
            raise Malformed(f"{METADATA}: an item of storage_data without name, file, offset or length")
        if place.get("transform_descriptors"):
            raise Unsupported(f"{METADATA}: {key} was written through {shown(place['transform_descriptors'])}, not plainly")
        yield (key, _sizes(offsets or (), key)), _Place(inside(path, named_by=METADATA), offset, nbytes)


def _sizes(value: object, key: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(one) is int and one >= 0 for one in value):
        raise Malformed(f"{METADATA}: {key}: expected sizes, found {shown(value)}")
    return value


class _Files:
    """The `.distcp` files, each opened once, and what their items are."""

    def __init__(self, folder: Folder, places: Mapping[tuple[str, tuple[int, ...]], _Place]) -> None:
        self.folder = folder
        self.places = places
        self.open: dict[str, ByteRange] = {}

    def close(self) -> None:
        for one in self.open.values():
            one.reader.close()

    def leaf(self, key: str, found: object) -> object:
        """A tensor, or the plain value of an item that holds none."""
        if isinstance(found, Instance) and found.name == f"{_MODULE}.metadata.BytesStorageMetadata":
            return self._item(key, ())
        fields = _fields(found, f"{_MODULE}.metadata.TensorStorageMetadata")
        shape = _sizes(fields.get("size"), key)
        properties, chunks = fields.get("properties"), fields.get("chunks")
        dtype = properties.state[0] if isinstance(properties, Instance) and isinstance(properties.state, tuple) else None
        if not isinstance(dtype, ElementType) or not isinstance(chunks, list):
            raise Malformed(f"{METADATA}: {key}: expected an element type and chunks")
        return self._whole(key, shape, dtype.name, [_chunk(key, one) for one in chunks])

    def _whole(self, key: str, shape: tuple[int, ...], dtype: str, boxes: list[Box]) -> Tensor:
        dtype_named(dtype)
        beyond = next((box for box in boxes if len(box.stop) != len(shape) or any(map(gt, box.stop, shape))), None)
        if beyond is not None:
            raise Malformed(f"{METADATA}: {key} of shape {shape}: the chunk {beyond} lies beyond it")
        report = prove_coverage(shape, boxes)
        if report.overlaps:
            raise CoverageOverlap(f"{METADATA}: {key} of shape {shape}: two chunks hold {report.overlaps[0][2]}")
        if report.gaps:
            raise CoverageGap(f"{METADATA}: {key} of shape {shape}: no chunk holds {report.gaps[0]}")
        pieces = tuple(self._piece(key, box, dtype) for box in boxes if box.count or len(boxes) == 1)
        if len(pieces) == 1 and pieces[0].box == Box.whole(shape):
            return pieces[0].stored
        return ChunkedTensor(shape, dtype, pieces)

    def _piece(self, key: str, box: Box, dtype: str) -> FilePiece:
        found = self._item(key, box.start)
        if not isinstance(found, StoredTensor):
            raise StructureConflict(f"{key}: {METADATA} says that it is a tensor, and its file holds none")
        if (found.shape, found.dtype) != (box.shape, dtype):
            raise StructureConflict(
                f"{found.storage.file}: {key}: expected {dtype} of shape {box.shape} as {METADATA} says,"
                f" found {found.dtype} of shape {found.shape}"
            )
        return FilePiece(box, found)

    def _item(self, key: str, offsets: tuple[int, ...]) -> object:
        place = self.places.get((key, offsets))
        if place is None:
            raise Malformed(f"{METADATA}: {key}: the chunk at {offsets} stands in no file")
        whole = self._opened(place.file)
        if place.offset < 0 or place.nbytes < 0 or place.offset + place.nbytes > whole.nbytes:
            raise Malformed(f"{place.file}: {key} is said to lie at {place.offset}, beyond the file's {whole.nbytes} bytes")
        return read_torch_file(ByteRange(place.file, whole.reader, place.offset, place.nbytes))

    def _opened(self, path: str) -> ByteRange:
        if path not in self.open:
            self.open[path] = ByteRange.whole(path, self.folder.store.open_reader(path))
        return self.open[path]


def _chunk(key: str, found: object) -> Box:
    fields = _fields(found, f"{_MODULE}.metadata.ChunkStorageMetadata")
    offsets, sizes = _sizes(fields.get("offsets"), key), _sizes(fields.get("sizes"), key)
    if len(offsets) != len(sizes):
        raise Malformed(f"{METADATA}: {key}: a chunk with {len(offsets)} offsets and {len(sizes)} sizes")
    return Box(offsets, tuple(low + size for low, size in zip(offsets, sizes, strict=True)))


def _path(key: object, planned: object) -> Path:
    """The place of a key in the nested value that was saved; the key itself where nobody planned one."""
    if not isinstance(key, str):
        raise Malformed(f"{METADATA}: a key that is no text")
    path = planned.get(key) if isinstance(planned, dict) else None
    if path is None:
        return (key,)
    if not isinstance(path, tuple) or not path or not all(isinstance(one, str | int) for one in path):
        raise Malformed(f"{METADATA}: {key}: expected a path of names and numbers, found {shown(path)}")
    return path


def _nest(leaves: list[tuple[Path, object]]) -> dict[object, object]:
    """The nested value that these leaves lie in; numbers below anything but `state` are places in a list."""
    root: dict[object, object] = {}
    for path, leaf in leaves:
        at = root
        for name in path[:-1]:
            below = at.setdefault(name, {})
            if not isinstance(below, dict):
                raise Malformed(f"{METADATA}: {path} goes through a value that is no mapping")
            at = below
        if path[-1] in at:
            raise Malformed(f"{METADATA}: two keys have the path {path}")
        at[path[-1]] = leaf
    return {name: _listed(name, one) for name, one in root.items()}


def _listed(name: object, value: object) -> object:
    if not isinstance(value, dict) or any(isinstance(key, Instance) for key in value):
        return value
    inner = {key: _listed(key, one) for key, one in value.items()}
    if inner and name != "state" and sorted(inner, key=str) == sorted(range(len(inner)), key=str):
        return [inner[k] for k in range(len(inner))]
    return inner
