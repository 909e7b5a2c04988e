"""Writes files of other libraries by their plans: into a draft folder beside OUT, whose rename is the commit."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from elastickpt.commit.draft import Draft, abort, begin, commit, new_draft, require_free, sweep
from elastickpt.convert.nodes import Node
from elastickpt.convert.reading import OPEN_FILES, lattice
from elastickpt.foreign.file_plans import FilePlan
from elastickpt.format.dtypes import dtype_named
from elastickpt.format.keys import DRAFT_TOKEN
from elastickpt.language.held import HeldPiece
from elastickpt.storage.opening import locate_for_saving
from elastickpt.storage.store import RangeWriter


@dataclass(frozen=True, slots=True)
class Delivery:
    """What goes into one slot, by the slot's key: all of an array, or what a rank has of it."""

    key: str
    node: Node
    pieces: tuple[HeldPiece, ...] | None  # None: the whole array as it is
    count: int  # elements of the slot

    @property
    def nbytes(self) -> int:
        return self.count * dtype_named(self.node.dtype).itemsize


class FilesTarget:
    """Files under way. As a context: an error, or no `commit`, leaves nothing at the path."""

    def __init__(self, path: str, plans: Sequence[FilePlan], *, single: bool) -> None:
        self._store, self._name = locate_for_saving(path)
        require_free(self._store, self._name)
        self._plans, self._single = tuple(plans), single
        self.draft: Draft = new_draft(self._name, pid=os.getpid())
        self._slots = {slot.tensor.key: (plan.path, slot.offset) for plan in plans for slot in plan.slots}
        self._sizes = {plan.path: plan.nbytes for plan in plans}
        self._writers: OrderedDict[str, RangeWriter] = OrderedDict()
        self._checksums: dict[str, int] = {}
        self._committed = False

    @classmethod
    def joined(cls, path: str, plans: Sequence[FilePlan], draft: Draft) -> Self:
        """Another worker at a draft that worker 0 has begun, and commits."""
        found = cls(path, plans, single=False)
        found.draft = draft
        return found

    def checksums(self) -> dict[str, int]:
        """All that this worker wrote is in the files: the CRC-32 of each of its slots."""
        self._close()
        return self._checksums

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.sync()
            writer.close()
        self._writers.clear()

    def __enter__(self) -> Self:
        sweep(self._store, self._name)
        begin(self._store, self.draft)
        self._store.remove_tree(self.draft.path("fragments"))
        for folder in sorted({plan.path.rpartition("/")[0] for plan in self._plans} - {""}):
            self._store.make_directories(self.draft.path(folder))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for writer in self._writers.values():
            writer.close()
        if not self._committed:
            abort(self._store, self.draft)

    @property
    def shares_files(self) -> bool:
        """Whether all files stay open, so that one thread may write while another one decides what comes next."""
        return len(self._plans) <= OPEN_FILES

    def put(self, key: str, words: NDArray[Any]) -> None:
        """Fills a slot: `words` are its elements in C order. Blocking."""
        path, offset = self._slots[key]
        data = np.ascontiguousarray(words).reshape(-1).view(np.uint8)
        self._checksums[key] = zlib.crc32(data.data)
        if data.size:
            self._writer(path).write(offset, data.data)

    def commit(self, others: Sequence[Mapping[str, int]] = ()) -> None:
        """Writes what stands around the tensors, makes all durable and gives it its name. Blocking.

        `others` are the checksums of what other workers wrote.
        """
        for checksums in others:
            self._checksums.update(checksums)
        for plan in self._plans:
            writer = self._writer(plan.path)
            for offset, data in plan.frames(self._checksums):
                if data:
                    writer.write(offset, memoryview(data))
        self._close()
        self._store.remove(self.draft.path(DRAFT_TOKEN))
        self._sync()
        if self._single:
            (plan,) = self._plans
            self._store.rename(self.draft.path(plan.path), self._name)
            self._store.remove_tree(self.draft.folder)
        else:
            commit(self._store, self.draft)
        self._committed = True
        if self._store.capabilities.directory_sync:
            self._store.sync_directory("")

    def _sync(self) -> None:
        if self._store.capabilities.tree_sync:
            self._store.sync_tree()
            return
        for plan in self._plans:
            self._store.sync_file(self.draft.path(plan.path))

    def _writer(self, path: str) -> RangeWriter:
        writer = self._writers.pop(path, None)
        if writer is None:
            writer = self._store.open_writer(self.draft.path(path), self._sizes[path])
        self._writers[path] = writer
        while len(self._writers) > OPEN_FILES:
            self._writers.popitem(last=False)[1].close()
        return writer


def words_of(delivery: Delivery, whole: NDArray[Any]) -> NDArray[Any]:
    """What goes into the slot of an array's words."""
    if delivery.pieces is None:
        return whole
    return local_words([(whole, delivery.pieces)], delivery.count)


def local_words(parts: Iterable[tuple[NDArray[Any], tuple[HeldPiece, ...]]], count: int) -> NDArray[Any]:
    """A local tensor of `count` elements, from what it has of whole arrays."""
    made: NDArray[Any] | None = None
    for whole, pieces in parts:
        if made is None:
            made = np.zeros(count, whole.dtype)
        for piece in pieces:
            if piece.count:
                lattice(made, piece.extents, piece.local)[...] = lattice(whole, piece.extents, piece.whole)
    if made is None:
        raise AssertionError("a local tensor of nothing")
    return made
