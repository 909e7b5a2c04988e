"""The two hashes of the format: xxh3-128 names whole record files, xxh3-64 names blocks of stored bytes. [UCF-40..41]

Both detect accidents, not forgery: integrity of a checkpoint is not its authenticity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer


def file_digest(data: Buffer) -> str:
    """The xxh3-128 of the bytes, seed 0, as 32 lower-case hex digits, most significant first. [UCF-40]"""
    return str(xxhash.xxh3_128_hexdigest(data))


def block_checksum(data: Buffer) -> int:
    """The xxh3-64 of the bytes (any C-contiguous buffer), seed 0, in [0, 2^64). [UCF-41]"""
    return int(xxhash.xxh3_64_intdigest(data))
