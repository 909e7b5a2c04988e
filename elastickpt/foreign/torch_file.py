"""Files of `torch.save`: the value that was saved, its tensors as places in the file. No storage is read. [FOR-20..26]"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from elastickpt.errors import ChecksumMismatch, LimitExceeded, Malformed, Unsafe, Unsupported
from elastickpt.foreign.pickle_machine import MAX_PICKLE_NBYTES, read_pickle
from elastickpt.foreign.pickle_names import NAMES
from elastickpt.foreign.pickle_values import StorageClass, StorageReference
from elastickpt.foreign.zip_records import ByteRange, ZipRecord, is_zip, zip_records
from elastickpt.format.arrays import DTYPES


def read_torch_file(archive: ByteRange) -> object:
    """What `torch.save` was given: plain values, `StoredTensor` for each strided tensor, inert stand-ins for the rest.

    Two names of one tensor, and views of one storage, are `StoredTensor`s with an equal `storage`. Raises Unsafe for a pickle
    that needs more than `spec/foreign-files.md` lists, Malformed for what is damaged, Unsupported for files from before
    torch 1.6, TorchScript archives and big-endian ones.
    """
    if not is_zip(archive):
        raise _no_archive(archive)
    records = zip_records(archive)
    root = _root(archive, records)
    if f"{root}constants.pkl" in records:
        raise Unsupported(f"{archive.file}: a TorchScript archive, which holds a program; save the module's state_dict instead")
    _check_byte_order(archive, records, root)
    pickle = records[f"{root}data.pkl"]
    return read_pickle(_read(archive, pickle), names=NAMES, persistent=_Storages(archive, records, root), where=archive.file)


class _Storages:
    """Makes a persistent id of the pickle the storage that it stands for."""

    def __init__(self, archive: ByteRange, records: Mapping[str, ZipRecord], root: str) -> None:
        self.archive = archive
        self.records = records
        self.root = root

    def __call__(self, found: object) -> object:
        if not isinstance(found, tuple) or len(found) != 5 or found[0] not in ("storage", b"storage"):
            raise Unsafe(f"{self.archive.file}: it needs a persistent object that is no storage")
        _, kind, key, _, count = found
        if not isinstance(kind, StorageClass) or not isinstance(key, str) or type(count) is not int or count < 0:
            raise Malformed(f"{self.archive.file}: a storage without class, key or size")
        record = self.records.get(f"{self.root}data/{key}")
        if record is None:
            raise Malformed(f"{self.archive.file}: storage {key!r} is named, and no record holds it")
        _require_plain(self.archive, record, key)
        itemsize = DTYPES[kind.dtype].itemsize if kind.dtype in DTYPES else 1
        if count * itemsize > record.storage.nbytes:
            raise Malformed(
                f"{self.archive.file}: storage {key!r} is said to have {count * itemsize} bytes,"
                f" its record has {record.storage.nbytes}"
            )
        return StorageReference(kind, record.storage)


def _no_archive(archive: ByteRange) -> Unsupported | Malformed:
    head = archive.read(0, min(archive.nbytes, 16))
    if head[:1] == b"\x80":
        return Unsupported(
            f"{archive.file}: a file of torch.save from before torch 1.6 (or a plain pickle), no zip archive;"
            " load it with torch and save it again"
        )
    return Malformed(f"{archive.file}: expected a zip archive of torch.save, found a file that begins with {head[:4]!r}")


def _root(archive: ByteRange, records: Mapping[str, ZipRecord]) -> str:
    """The folder inside the archive, with its slash."""
    found = [name.removesuffix("data.pkl") for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    roots = [root for root in found if root.count("/") <= 1]
    if len(roots) != 1:
        raise Malformed(f"{archive.file}: expected one record data.pkl in the archive's folder, found {len(roots)}")
    return roots[0]


def _check_byte_order(archive: ByteRange, records: Mapping[str, ZipRecord], root: str) -> None:
    record = records.get(f"{root}byteorder")
    if record is not None and (order := _read(archive, record)) != b"little":
        raise Unsupported(f"{archive.file}: byte order {order[:16]!r}; this reader knows little-endian files only")


def _require_plain(archive: ByteRange, record: ZipRecord, name: str) -> None:
    if record.packed:
        raise Unsupported(f"{archive.file}: record {name!r} is packed or encrypted; expected records stored as they are")


def _read(archive: ByteRange, record: ZipRecord) -> bytes:
    """A small record's bytes, compared with their checksum; 0 is that of a writer that made none."""
    _require_plain(archive, record, "data.pkl")
    if record.storage.nbytes > MAX_PICKLE_NBYTES:
        raise LimitExceeded(f"{archive.file}: a pickle of {record.storage.nbytes} bytes, the limit is {MAX_PICKLE_NBYTES}")
    data = archive.read(record.storage.start - archive.start, record.storage.nbytes)
    if record.crc32 and zlib.crc32(data) != record.crc32:
        raise ChecksumMismatch(f"{archive.file}: bytes at {record.storage.start} differ from the checksum in the archive")
    return data
