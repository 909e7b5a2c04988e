"""A file of torch.save that is to be written: a zip archive of records stored as they are, each aligned. [FOR-93..97]

As torch lays it out: `data.pkl`, `byteorder`, the storages `data/0`, `data/1`, ..., `version`, then the directory; zip64 where
a size, place or count needs it. Source: PKWARE's APPNOTE 6.3.10.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from elastickpt.foreign.file_plans import ByteFrame, FileChecksums, FilePlan, NewTensor, TensorSlot
from elastickpt.foreign.pickle_emitter import emit_pickle
from elastickpt.format.values import ArrayValue

_ALIGNMENT = 64
_ROOT = "archive/"
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_DATE = 0x21  # 1980-01-01: files with the same content are the same bytes


@dataclass(frozen=True, slots=True)
class _Record:
    """A record, laid out; `data` is None where a slot's bytes go."""

    name: bytes
    header: int
    start: int
    nbytes: int
    data: bytes | None
    tensor: NewTensor | None

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def crc32(self, checksums: FileChecksums) -> int:
        if self.data is not None:
            return zlib.crc32(self.data)
        return checksums.get(self.tensor.key, 0) if self.tensor is not None else 0


def plan_torch_archive(path: str, value: object, *, start: int = 0) -> FilePlan:
    """The archive that holds `value`, in which a `NewTensor` stands for each tensor. Raises ValueNotCarried by place.

    Offsets of slots and frames count from `start`, where the archive begins in its file. A tensor that stands in `value` twice
    has one storage.
    """
    tensors: dict[object, str] = {}
    wanted: list[NewTensor | ArrayValue] = []

    def key_of(tensor: NewTensor | ArrayValue) -> str:
        identity = tensor.key if isinstance(tensor, NewTensor) else len(wanted)
        if identity not in tensors:
            tensors[identity] = str(len(wanted))
            wanted.append(tensor)
        return tensors[identity]

    pickle = emit_pickle(value, key_of)
    records = [_placed("data.pkl", 0, len(pickle), pickle, None)]
    records.append(_placed("byteorder", records[-1].end, 6, b"little", None))
    for number, tensor in enumerate(wanted):
        data = tensor.data if isinstance(tensor, ArrayValue) else None
        nbytes = len(tensor.data) if isinstance(tensor, ArrayValue) else tensor.nbytes
        given = tensor if isinstance(tensor, NewTensor) else None
        records.append(_placed(f"data/{number}", records[-1].end, nbytes, data, given))
    records.append(_placed("version", records[-1].end, 2, b"3\n", None))
    slots = tuple(TensorSlot(one.tensor, start + one.start) for one in records if one.tensor is not None)
    nbytes = records[-1].end + len(_directory(records, {}))
    return FilePlan(path, nbytes, slots, lambda checksums: _frames(records, checksums, start))


def _placed(name: str, header: int, nbytes: int, data: bytes | None, tensor: NewTensor | None) -> _Record:
    full = (_ROOT + name).encode()
    least = header + 30 + len(full) + (24 if nbytes >= _FULL32 else 4)
    return _Record(full, header, -(-least // _ALIGNMENT) * _ALIGNMENT, nbytes, data, tensor)


def _frames(records: list[_Record], checksums: FileChecksums, start: int) -> Iterator[ByteFrame]:
    for one in records:
        yield start + one.header, _local_header(one, checksums)
        if one.data is not None:
            yield start + one.start, one.data
    yield start + records[-1].end, _directory(records, checksums)


def _local_header(one: _Record, checksums: FileChecksums) -> bytes:
    wide = one.nbytes >= _FULL32
    size = _FULL32 if wide else one.nbytes
    extra = struct.pack("<2H2Q", 1, 16, one.nbytes, one.nbytes) if wide else b""
    fill = one.start - one.header - 30 - len(one.name) - len(extra)
    extra += struct.pack("<2sH", b"FB", fill - 4) + b"Z" * (fill - 4)
    version = 45 if wide else 20
    fields = (version, 0x800, 0, 0, _DATE, one.crc32(checksums), size, size, len(one.name), len(extra))
    return struct.pack("<4s5H3L2H", b"PK\x03\x04", *fields) + one.name + extra


def _directory(records: list[_Record], checksums: FileChecksums) -> bytes:
    made = bytearray()
    for one in records:
        made += _entry(one, checksums)
    nbytes, offset, count = len(made), records[-1].end, len(records)
    if count >= _FULL16 or offset >= _FULL32 or nbytes >= _FULL32:
        at = offset + nbytes
        made += struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, nbytes, offset)
        made += struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    short = min(count, _FULL16)
    made += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, short, short, min(nbytes, _FULL32), min(offset, _FULL32), 0)
    return bytes(made)


def _entry(one: _Record, checksums: FileChecksums) -> bytes:
    wide = [one.nbytes, one.nbytes] if one.nbytes >= _FULL32 else []
    wide += [one.header] if one.header >= _FULL32 else []
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, version = min(one.nbytes, _FULL32), 45 if wide else 20
    head = (version, version, 0x800, 0, 0, _DATE, one.crc32(checksums), size, size, len(one.name), len(extra), 0, 0, 0, 0)
    return struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *head, min(one.header, _FULL32)) + one.name + extra
