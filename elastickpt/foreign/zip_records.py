"""The records of a zip archive that lies in a range of a file: where their bytes are. Nothing is unpacked. [FOR-20..24]

Only what torch writes can be used: records that are stored as they are, in one part, not encrypted, zip64 where it is
needed. Sizes and places are checked against the range before anything is read, and records may not overlap.
Source: PKWARE's APPNOTE 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from elastickpt.errors import LimitExceeded, Malformed, Unsupported
from elastickpt.foreign.listing import Storage
from elastickpt.format.version import MIB
from elastickpt.storage.store import RangeReader

MAX_DIRECTORY_NBYTES = 256 * MIB
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT_NBYTES = 65535
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A part of a file that is read through `reader`; `file` is its name for messages."""

    file: str
    reader: RangeReader
    start: int
    nbytes: int

    @classmethod
    def whole(cls, file: str, reader: RangeReader) -> ByteRange:
        return cls(file, reader, 0, reader.nbytes)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes of the range. Raises Malformed, before anything is allocated, where they are not all in it."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise Malformed(f"{self.file}: bytes {offset} to {offset + nbytes} are named, the archive has {self.nbytes}")
        found = bytearray(nbytes)
        self.reader.read_into(self.start + offset, memoryview(found))
        return bytes(found)


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """One record: its bytes, and the checksum that the archive states for them. `packed` bytes are not its content."""

    storage: Storage
    crc32: int
    packed: bool


@dataclass(frozen=True, slots=True)
class _Directory:
    offset: int
    nbytes: int
    count: int


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    nbytes: int
    header: int
    crc32: int
    packed: bool


def zip_records(archive: ByteRange) -> Mapping[str, ZipRecord]:
    """Record by name. Raises Malformed for what is no whole archive, Unsupported for one in several parts."""
    directory = _directory(archive)
    data = archive.read(directory.offset, directory.nbytes)
    entries = list(_entries(archive.file, data, directory.count))
    found: dict[str, ZipRecord] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        start = entry.header + _local_nbytes(archive, entry.header, entry.name)
        if entry.header < end or start + entry.nbytes > directory.offset:
            raise Malformed(f"{archive.file}: record {entry.name!r} does not lie between its neighbours")
        if entry.name in found:
            raise Malformed(f"{archive.file}: record {entry.name!r} stands twice in the archive")
        end = start + entry.nbytes
        found[entry.name] = ZipRecord(Storage(archive.file, archive.start + start, entry.nbytes), entry.crc32, entry.packed)
    return found


def is_zip(archive: ByteRange) -> bool:
    """Whether it begins as an archive with at least one record does."""
    return archive.nbytes >= 4 and archive.read(0, 4) == b"PK\x03\x04"


def _directory(archive: ByteRange) -> _Directory:
    """First the last bytes, where the end record of an archive without a comment stands; no tensor's bytes are read so."""
    for tail_nbytes in (_END.size, _END.size + _MAX_COMMENT_NBYTES):
        tail_nbytes = min(archive.nbytes, tail_nbytes)
        tail = archive.read(archive.nbytes - tail_nbytes, tail_nbytes)
        at = tail.rfind(b"PK\x05\x06")
        if 0 <= at <= len(tail) - _END.size:
            break
    else:
        raise Malformed(f"{archive.file}: no whole zip archive: its directory is missing (is the file cut short?)")
    _, disk, first_disk, here, count, nbytes, offset, _ = _END.unpack_from(tail, at)
    end = archive.nbytes - tail_nbytes + at
    if _FULL16 in (here, count) or _FULL32 in (nbytes, offset):
        end, count, nbytes, offset = _wide_directory(archive, end)
    elif disk or first_disk or here != count:
        raise Unsupported(f"{archive.file}: a zip archive in several parts")
    if nbytes > MAX_DIRECTORY_NBYTES:
        raise LimitExceeded(f"{archive.file}: a zip directory of {nbytes} bytes, the limit is {MAX_DIRECTORY_NBYTES}")
    if offset + nbytes > end:
        raise Malformed(f"{archive.file}: its zip directory is said to lie at {offset}, {nbytes} bytes, and ends at {end}")
    return _Directory(offset, nbytes, count)


def _wide_directory(archive: ByteRange, end: int) -> tuple[int, int, int, int]:
    """(where the directory ends, count, bytes, offset) of a zip64 archive whose plain end record stands at `end`."""
    at = end - _END64_LOCATOR.size
    signature, _, _, _ = _END64_LOCATOR.unpack(archive.read(at, _END64_LOCATOR.size))
    if signature != b"PK\x06\x07":
        raise Malformed(f"{archive.file}: sizes beyond 32 bits, and no zip64 record that tells them")
    at -= _END64.size
    signature, nbytes_left, _, _, disk, first_disk, here, count, nbytes, offset = _END64.unpack(archive.read(at, _END64.size))
    if signature != b"PK\x06\x06" or nbytes_left != _END64.size - 12:
        raise Malformed(f"{archive.file}: its zip64 record is not where it belongs")
    if disk or first_disk or here != count:
        raise Unsupported(f"{archive.file}: a zip archive in several parts")
    return at, count, nbytes, offset


def _entries(file: str, data: bytes, count: int) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        if len(data) - at < _ENTRY.size:
            raise Malformed(f"{file}: its zip directory ends before its {count} entries")
        signature, _, _, flags, method, _, _, crc32, packed, nbytes, *more = _ENTRY.unpack_from(data, at)
        name_nbytes, extra_nbytes, comment_nbytes, _, _, _, header = more
        at += _ENTRY.size
        name_and_extra = data[at : at + name_nbytes + extra_nbytes]
        if signature != b"PK\x01\x02" or len(name_and_extra) != name_nbytes + extra_nbytes:
            raise Malformed(f"{file}: its zip directory is broken at byte {at}")
        at += name_nbytes + extra_nbytes + comment_nbytes
        try:
            name = str(name_and_extra[:name_nbytes], "utf-8")
        except UnicodeDecodeError:
            raise Malformed(f"{file}: a record's name is no UTF-8") from None
        nbytes, packed, header = _wide(file, name_and_extra[name_nbytes:], (nbytes, packed, header))
        is_packed = bool(flags & _ENCRYPTED) or method != 0
        if nbytes != packed and not is_packed:
            raise Malformed(f"{file}: record {name!r} is said to have {nbytes} bytes and {packed}")
        yield _Entry(name, packed, header, crc32, is_packed)


def _wide(file: str, extra: bytes, numbers: tuple[int, int, int]) -> tuple[int, int, int]:
    """Size, packed size and header's place, each taken from the zip64 field where it does not fit 32 bits."""
    wanted = [k for k, number in enumerate(numbers) if number == _FULL32]
    if not wanted:
        return numbers
    at = 0
    while len(extra) - at >= 4:
        kind, nbytes = struct.unpack_from("<2H", extra, at)
        if kind == 1 and nbytes >= 8 * len(wanted) and len(extra) - at - 4 >= 8 * len(wanted):
            wide = dict(zip(wanted, struct.unpack_from(f"<{len(wanted)}Q", extra, at + 4), strict=True))
            size, packed, header = (wide.get(k, number) for k, number in enumerate(numbers))
            return size, packed, header
        at += 4 + nbytes
    raise Malformed(f"{file}: a record beyond 32 bits, and no zip64 field that tells its size")


def _local_nbytes(archive: ByteRange, header: int, name: str) -> int:
    """Bytes of the header that stands before a record's bytes."""
    fields = _LOCAL.unpack(archive.read(header, _LOCAL.size))
    if fields[0] != b"PK\x03\x04":
        raise Malformed(f"{archive.file}: record {name!r} does not begin where the directory says")
    return _LOCAL.size + int(fields[-2]) + int(fields[-1])
