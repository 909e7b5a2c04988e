"""The journal of a conversion: what is done of it, so that the same command goes on after an interruption. [CLI-67]

A file of one place for each task, known before the first is done: what the task leaves to be known (checksums of what it
wrote), and a seal over that, the attempt's id and the task's number. A place without a right seal, as it is before the task, or
torn, says that the task is to be done. The journal is not made durable: only processes of the same boot of the same host take a
draft up, and for these the kernel keeps what was written, whatever became of who wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate

from elastickpt.commit.draft import JOURNAL, Draft
from elastickpt.errors import CheckpointError
from elastickpt.format.digest import block_checksum
from elastickpt.storage.store import RangeWriter, Store

_SEAL_NBYTES = 8


class Journal:
    """`sizes`: how many bytes each task leaves. Any thread, and any worker of the conversion, may note what it did."""

    def __init__(self, store: Store, draft: Draft, sizes: Sequence[int]) -> None:
        self._store, self._draft, self._sizes = store, draft, tuple(sizes)
        self._places = tuple(accumulate((size + _SEAL_NBYTES for size in sizes), initial=0))
        self._writer: RangeWriter | None = None

    @property
    def nbytes(self) -> int:
        return self._places[-1]

    def open(self) -> None:
        """It can be written to, and stands in the draft. Raises StorageFailed kinds."""
        self._writer = self._store.open_writer(self._draft.path(JOURNAL), self.nbytes)

    def note(self, task: int, left: bytes) -> None:
        """The task is done. What it wrote must be where it belongs by now. Raises StorageFailed kinds."""
        if len(left) != self._sizes[task]:
            raise AssertionError(f"task {task} leaves {len(left)} bytes, not {self._sizes[task]}")
        if self._writer is not None:
            self._writer.write(self._places[task], memoryview(left + self._seal(task, left)))

    def done(self) -> Mapping[int, bytes]:
        """What each task left that is done; none where the journal cannot be read or is of another size."""
        try:
            data = self._store.read(self._draft.path(JOURNAL), self.nbytes)
        except CheckpointError:
            return {}
        found = {}
        for task, (size, at) in enumerate(zip(self._sizes, self._places, strict=False)):
            left = data[at : at + size]
            if data[at + size : at + size + _SEAL_NBYTES] == self._seal(task, left):
                found[task] = left
        return found

    def close(self) -> None:
        """Gives it up. Raises nothing: what it says is needed only if it can be read."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(CheckpointError):
                writer.close()

    def _seal(self, task: int, left: bytes) -> bytes:
        return block_checksum(f"{self._draft.attempt} {task} ".encode() + left).to_bytes(_SEAL_NBYTES, "big")
