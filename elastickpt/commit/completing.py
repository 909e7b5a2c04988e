"""Creating a file that a process which is gone, or one that is late, may have begun with the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from elastickpt.errors import PathOccupied
from elastickpt.storage.store import Store

Create = Callable[[str, bytes], None]


def completing(store: Store) -> Create:
    """`store.create`, where another process may have made the file, or a part of it, from the same bytes.

    Its bytes are written again, as only the other one was told what the kernel could not write of them. Any other file is
    an error: the attempt is not ours alone.
    """

    def create(path: str, data: bytes) -> None:
        try:
            return store.create(path, data)
        except PathOccupied:
            found = store.read(path, len(data))
            if not _is_part(found, data):
                raise
        writer = store.open_writer(path, len(data))
        try:
            writer.write(0, memoryview(data))
            writer.sync()
        finally:
            writer.close()

    return create


def _is_part(found: bytes, data: bytes) -> bool:
    """Whether writing `data` may have left this, cut short anywhere; what a second writing had not come to reads as zero."""
    written, wanted = np.frombuffer(found, dtype=np.uint8), np.frombuffer(data, dtype=np.uint8)[: len(found)]
    return bool(np.all((written == wanted) | (written == 0)))
