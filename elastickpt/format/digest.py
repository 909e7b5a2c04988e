"""The two hashes of the format, and records of JSON that end with the digest of all bytes before it. [UCF-40..41, UCF-71]

xxh3-128 names whole record files, xxh3-64 blocks of stored bytes: one flipped bit anywhere is found. Both detect accidents, not
forgery: integrity of a checkpoint is not its authenticity.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import xxhash

from elastickpt.errors import ChecksumMismatch, Malformed
from elastickpt.format.canonical_json import bounded, dump

if TYPE_CHECKING:
    from typing_extensions import Buffer


def file_digest(data: Buffer) -> str:
    """The xxh3-128 of the bytes, seed 0, as 32 lower-case hex digits, most significant first. [UCF-40]"""
    return str(xxhash.xxh3_128_hexdigest(data))


block_checksum: Callable[[Buffer], int] = xxhash.xxh3_64_intdigest
"""The xxh3-64 of the bytes (any C-contiguous buffer), seed 0, in [0, 2^64). [UCF-41]"""


def block_checksums(data: memoryview, blocks: Iterable[tuple[int, int]]) -> list[int]:
    """Those of bytes [start, stop) of a buffer, one after the other."""
    return [block_checksum(data[start:stop]) for start, stop in blocks]


def whole_checksums(data: memoryview, block_nbytes: int) -> list[int]:
    """Those of all blocks of a buffer, of which the last one may be shorter."""
    return [block_checksum(data[start : start + block_nbytes]) for start in range(0, data.nbytes, block_nbytes)]


_TAIL = re.compile(rb',"digest":"([0-9a-f]{32})"\}\n')
SEAL_NBYTES = len(b',"digest":""}\n') + 32


def seal(record: dict[str, object], *, where: str) -> bytes:
    """The canonical text of a record that has members, with one more, its digest. Raises ValueNotCarried if it is too large."""
    return seal_text(dump(record), where=where)


def seal_text(record: str, *, where: str) -> bytes:
    """The same of the canonical text of a record."""
    body = bounded(record, where=where).encode("ascii")[:-1]
    return body + f',"digest":"{file_digest(body)}"}}\n'.encode("ascii")


def check_seal(data: bytes, *, where: str) -> None:
    """Raises Malformed where the digest's place is not found, ChecksumMismatch where it is another one."""
    tail = _TAIL.fullmatch(data[-SEAL_NBYTES:])
    if tail is None:  # [UCF-71]
        raise Malformed(f"{where}: does not end with a digest of itself; cut short, or no record of ours")
    found = file_digest(memoryview(data)[:-SEAL_NBYTES])
    recorded = tail[1].decode("ascii")
    if found != recorded:
        raise ChecksumMismatch(f"{where}: expected xxh3-128 {recorded} (its last member), found {found}")
