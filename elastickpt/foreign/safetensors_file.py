"""safetensors files: a JSON header of names, types, shapes and ranges, then the bytes. [FOR-40..46]

Source: the format's description in huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from elastickpt.errors import LimitExceeded, Malformed, MissingFile, NotACheckpoint, Refused, StructureConflict, Unsupported
from elastickpt.foreign.folder import Folder, inside
from elastickpt.foreign.listing import FilePiece, ForeignCheckpoint, Storage, StoredTensor, TiedName, WholeTensor
from elastickpt.foreign.plain_values import constants_of
from elastickpt.foreign.zip_records import ByteRange
from elastickpt.format import canonical_json
from elastickpt.format.arrays import DTYPES, Box
from elastickpt.layout.grid import c_strides

MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors library itself
INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"
CONFIGS = ("config.json", "params.json")
DTYPE_NAMES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
}
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """What one file's header says: tensors in the header's order, and its free text."""

    tensors: Mapping[str, StoredTensor]
    notes: Mapping[str, str]


def read_safetensors_file(archive: ByteRange) -> SafetensorsFile:
    """The header of a file. Raises Malformed for ranges that overlap, leave gaps or do not fit, Unsupported by type."""
    if archive.nbytes < 8:
        raise Malformed(f"{archive.file}: {archive.nbytes} bytes are no safetensors file")
    nbytes = int.from_bytes(archive.read(0, 8), "little")
    if nbytes > MAX_HEADER_NBYTES:
        raise LimitExceeded(f"{archive.file}: a header of {nbytes} bytes, the limit is {MAX_HEADER_NBYTES}")
    if nbytes > archive.nbytes - 8:
        raise Malformed(f"{archive.file}: a header of {nbytes} bytes in a file of {archive.nbytes}")
    header = canonical_json.parse(archive.read(8, nbytes), where=archive.file)
    if not isinstance(header, dict):
        raise Malformed(f"{archive.file}: expected a mapping of names as header, found a {type(header).__name__}")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(one, str) for one in notes.values()):
        raise Malformed(f"{archive.file}: __metadata__ holds something else than text")
    tensors = {name: _tensor(archive, name, entry, 8 + nbytes) for name, entry in header.items()}
    _check_ranges(archive, tensors, 8 + nbytes)
    return SafetensorsFile(tensors, notes)


def _tensor(archive: ByteRange, name: str, entry: object, begin: int) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    where = f"{archive.file}: tensor {name!r}"
    dtype, shape, ends = fields.get("dtype"), _whole_numbers(fields.get("shape")), _whole_numbers(fields.get("data_offsets"))
    if set(fields) != {"dtype", "shape", "data_offsets"} or shape is None or ends is None:
        raise Malformed(f"{where}: expected dtype, shape and data_offsets")
    if dtype not in DTYPE_NAMES:
        raise Unsupported(f"{where}: element type {dtype!r}, which no array of a checkpoint has")
    kind = DTYPES[DTYPE_NAMES[str(dtype)]]
    start, stop = (*ends, 0, 0)[:2]
    if len(ends) != 2 or not 0 <= start <= stop <= archive.nbytes - begin or stop - start != prod(shape) * kind.itemsize:
        raise Malformed(f"{where}: bytes {ends} do not fit shape {shape} of {dtype} or the file of {archive.nbytes} bytes")
    storage = Storage(archive.file, archive.start + begin + start, stop - start)
    return StoredTensor(storage, 0, shape, c_strides(shape, 1), kind.name)


def _whole_numbers(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(one) is int and one >= 0 for one in value):
        return tuple(value)
    return None


def _check_ranges(archive: ByteRange, tensors: Mapping[str, StoredTensor], begin: int) -> None:
    """Bytes follow one another from the header to the file's end, as the library itself demands."""
    at, before = begin, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda pair: (pair[1].storage.start, pair[1].storage.nbytes)):
        start = tensor.storage.start - archive.start
        if start != at:
            what = "overlaps" if start < at else "leaves a gap after"
            raise Malformed(f"{archive.file}: tensor {name!r} {what} {before}")
        at, before = start + tensor.storage.nbytes, repr(name)
    if at != archive.nbytes:
        raise Malformed(f"{archive.file}: {archive.nbytes - at} bytes after the last tensor belong to none")


def read_safetensors(folder: Folder) -> ForeignCheckpoint:
    """A file, or a folder with an index or files that complete one another; constants are those of `config.json`.

    Raises MissingFile for a file that an index names and that is not there, Unsafe for one outside the folder,
    StructureConflict where index and files contradict each other or a name stands in two files.
    """
    found = _files(folder)
    wholes: dict[str, WholeTensor] = {}
    notes: dict[str, object] = {}
    tied: list[TiedName] = []
    for path, wanted in found.items():
        with folder.opened(path) as archive:
            file = read_safetensors_file(archive)
        _check_index(path, wanted, file.tensors)
        ties = [TiedName("model", alias, name) for alias, name in file.notes.items() if _is_tie(alias, name, file.tensors)]
        tied.extend(ties)
        aliases = {one.alias for one in ties}
        notes |= {name: text for name, text in file.notes.items() if name != "format" and name not in aliases}
        for name, tensor in file.tensors.items():
            if name in wholes:
                raise StructureConflict(f"{path}: tensor {name!r} stands in another file too")
            pieces = (FilePiece(Box.whole(tensor.shape), tensor),) if tensor.count else ()
            wholes[name] = WholeTensor("model", name, "value", tensor.shape, tensor.dtype, pieces)
    config = read_config(folder)
    values = {f"/{name}": value for name, value in (("config", config), ("metadata", notes)) if value}
    return ForeignCheckpoint(
        format="safetensors",
        folder=folder.url,
        files=tuple(folder.file(path) for path in found),
        wholes=tuple(wholes.values()),
        tied=tuple(one for one in tied if one.alias not in wholes),
        constants=constants_of(config),
        values=values,
    )


def _is_tie(alias: str, name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a note is the library's way to say that two names are one tensor."""
    return name in tensors and alias not in tensors


def read_config(folder: Folder) -> dict[str, object]:
    """The model's own facts beside its files; empty where there are none."""
    found = [name for name in CONFIGS if name in folder.names()]
    config = folder.json(found[0]) if found else {}
    if not isinstance(config, dict):
        raise Malformed(f"{found[0]}: expected a mapping, found a {type(config).__name__}")
    return config


def _files(folder: Folder) -> dict[str, frozenset[str] | None]:
    """Files to read, and which names the index says each one holds (None without an index)."""
    names = sorted(folder.names())
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) > 1:
        raise Refused(f"{folder.url}: several indexes: {', '.join(indexes)}; name the files of one in a folder of their own")
    if indexes:
        return dict(_indexed(folder, indexes[0], names))
    files = [name for name in names if name.endswith(SUFFIX)]
    if not files:
        raise NotACheckpoint(f"{folder.url}: expected files *.safetensors, found none")
    _check_numbers(files)
    return dict.fromkeys(files)


def _indexed(folder: Folder, index: str, names: Iterable[str]) -> Iterable[tuple[str, frozenset[str]]]:
    content = folder.json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(path, str) for path in places.values()):
        raise Malformed(f"{index}: expected the mapping `weight_map` from names to files")
    held: dict[str, set[str]] = {}
    for name, path in places.items():
        held.setdefault(inside(path, named_by=index), set()).add(name)
    for path in held:
        if "/" not in path and path not in names:
            raise MissingFile(f"{index}: it names the file {path}, which is not there")
    return ((path, frozenset(there)) for path, there in held.items())


def _check_index(path: str, wanted: frozenset[str] | None, found: Mapping[str, StoredTensor]) -> None:
    if wanted is None or wanted == found.keys():
        return
    missing = sorted(wanted - found.keys())
    if missing:
        raise StructureConflict(f"{path}: the index says that it holds {missing[0]!r}, and it does not")
    more = sorted(found.keys() - wanted)
    raise StructureConflict(f"{path}: it holds {more[0]!r}, of which the index says nothing or another file")


def _check_numbers(files: Iterable[str]) -> None:
    """Files numbered i of n are there with all their numbers."""
    for name in files:
        match = _NUMBERED.fullmatch(name)
        if match is None:
            continue
        there = set(files)
        for number in range(1, int(match[3]) + 1):
            wanted = f"{match[1]}-{number:05d}-of-{match[3]}{SUFFIX}"
            if wanted not in there:
                raise MissingFile(f"{wanted} is missing beside {name}")
