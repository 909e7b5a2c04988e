"""Records of JSON that end with the digest of all bytes before it: one flipped bit anywhere is found. [UCF-71]"""

from __future__ import annotations

import re

from elastickpt.errors import ChecksumMismatch, Malformed
from elastickpt.format.canonical_json import dump_bounded
from elastickpt.format.digest import file_digest

_TAIL = re.compile(rb',"digest":"([0-9a-f]{32})"\}\n')
_TAIL_NBYTES = len(b',"digest":""}\n') + 32


def seal(record: dict[str, object], *, where: str) -> bytes:
    """The canonical text of a record that has members, with one more, its digest. Raises ValueNotCarried if it is too large."""
    body = dump_bounded(record, where=where).encode("ascii")[:-1]
    return body + f',"digest":"{file_digest(body)}"}}\n'.encode("ascii")


def check_seal(data: bytes, *, where: str) -> None:
    """Raises Malformed where the digest's place is not found, ChecksumMismatch where it is another one."""
    tail = _TAIL.fullmatch(data[-_TAIL_NBYTES:])
    if tail is None:  # [UCF-71]
        raise Malformed(f"{where}: does not end with a digest of itself; cut short, or no record of ours")
    found = file_digest(memoryview(data)[:-_TAIL_NBYTES])
    recorded = tail[1].decode("ascii")
    if found != recorded:
        raise ChecksumMismatch(f"{where}: expected xxh3-128 {recorded} (its last member), found {found}")
