"""Writes files of other libraries by their plans: into a draft folder beside OUT, whose rename is the commit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from elastickpt.commit.draft import commit
from elastickpt.convert.buffers import Buffers
from elastickpt.convert.conversion_draft import ConversionDraft
from elastickpt.convert.nodes import Node
from elastickpt.convert.saved_forms import Delivery, SavedForm
from elastickpt.convert.words import lattice
from elastickpt.errors import CheckpointError
from elastickpt.foreign.file_plans import FilePlan
from elastickpt.format.memory_views import address_of
from elastickpt.storage.kernel import MIN_DIRECT_NBYTES, PAGE
from elastickpt.storage.store import RangeWriter, Store
from elastickpt.writer.write_files import directories_of

OPEN_FILES = 64
_STEP_NBYTES = 8 << 20  # of what is copied to be written past the page cache
_CRC_NBYTES = 4

FileChecksums = dict[str, int]


class FilesTarget:
    """Files under way. A task is a node with all its slots: tensors of files, or what ranks have of one."""

    def __init__(self, form: SavedForm) -> None:
        self._form = form
        by_node: dict[int, list[Delivery]] = {}
        for delivery in form.deliveries:
            by_node.setdefault(id(delivery.node), []).append(delivery)
        self._tasks = tuple(map(tuple, by_node.values()))
        self._slots = {slot.tensor.key: (plan.path, slot.offset) for plan in form.plans for slot in plan.slots}
        self.nodes: tuple[Node, ...] = tuple(some[0].node for some in self._tasks)
        self.nbytes = tuple(sum(one.nbytes for one in some) for some in self._tasks)
        self.left = tuple(_CRC_NBYTES * len(some) for some in self._tasks)
        self._checksums: FileChecksums = {}

    def describe(self) -> Iterator[object]:
        """All that decides where bytes go."""
        for plan in self._form.plans:
            yield plan.path, plan.nbytes, [(slot.tensor.key, slot.offset) for slot in plan.slots]

    def prepare(self, out: ConversionDraft) -> None:
        """The draft is as every worker expects it. Blocking."""
        out.store.remove_tree(out.draft.path("fragments"))
        for folder in sorted({plan.path.rpartition("/")[0] for plan in self._form.plans} - {""}):
            out.store.make_directories(out.draft.path(folder))

    def open(self, out: ConversionDraft, buffers: Buffers, *, worker: int) -> None:
        """Tasks are done there from now on. Blocking."""
        self._out, self._buffers = out, buffers
        self._files = _Files(out.store, {out.draft.path(plan.path): plan.nbytes for plan in self._form.plans})

    def close(self) -> None:
        """Gives up what is open. Raises nothing."""
        self._files.abandon()

    def phase(self, task: int) -> int:
        """Where behind a page's begin the words of a task lie best."""
        one = self._tasks[task][0]
        return self._slots[one.key][1] % PAGE if one.pieces is None else 0

    def beside(self, task: int) -> int:
        """Bytes that a task needs beside its words."""
        return max((one.nbytes for one in self._tasks[task] if one.pieces is not None), default=_STEP_NBYTES)

    def put(self, task: int, words: NDArray[Any]) -> bytes:
        """Fills the slots of a task: `words` are the node's elements in C order. Blocking."""
        left = b""
        for one in self._tasks[task]:
            path, offset = self._slots[one.key]
            local = words if one.pieces is None else self._local(one, words, offset % PAGE)
            data = local.reshape(-1).view(np.uint8)
            left += crc32(data.data).to_bytes(_CRC_NBYTES, "big")
            with self._files.writer(self._out.draft.path(path)) as writer:
                self._write(writer, offset, data)
            if one.pieces is not None:
                self._buffers.give_back(local)
        self.adopt(task, left)
        return left

    def adopt(self, task: int, left: bytes) -> None:
        """A task is done, by whomever; `left` is what `put` gave."""
        for number, one in enumerate(self._tasks[task]):
            self._checksums[one.key] = int.from_bytes(left[number * _CRC_NBYTES : (number + 1) * _CRC_NBYTES], "big")

    def written(self) -> FileChecksums:
        """All that this worker wrote is durable: the CRC-32 of each of its slots. Blocking."""
        self._files.settle()
        return self._checksums

    def commit(self, others: Sequence[FileChecksums]) -> None:
        """Writes what stands around the tensors, makes all durable and gives it its name. Blocking.

        `others` is what other workers wrote.
        """
        out, store = self._out, self._out.store
        for checksums in others:
            self._checksums.update(checksums)
        for plan in self._form.plans:
            self._frame(plan)
        if store.capabilities.directory_sync:
            for folder in directories_of([plan.path for plan in self._form.plans]):
                store.sync_directory(out.draft.path(folder))
        out.seal()
        with out.publishing():
            if self._form.single:
                (plan,) = self._form.plans
                store.rename(out.draft.path(plan.path), out.name)
                with suppress(CheckpointError):  # nothing of OUT is in it: the next conversion sweeps it
                    store.remove_tree(out.draft.folder)
            else:
                commit(store, out.draft)
            out.confirm()

    def _frame(self, plan: FilePlan) -> None:
        """The file is whole and durable, whoever wrote how much of it, now or before an interruption."""
        with self._files.writer(self._out.draft.path(plan.path)) as writer:
            for offset, data in plan.frames(self._checksums):
                if data:
                    writer.write(offset, memoryview(data))
            writer.sync()

    def _local(self, one: Delivery, words: NDArray[Any], phase: int) -> NDArray[Any]:
        """The words of a slot, in memory that lies as the slot does."""
        made = self._buffers.take(one.nbytes, phase).view(words.dtype)
        pieces = one.pieces or ()
        if sum(piece.count for piece in pieces) < one.count:
            made[...] = 0
        for piece in pieces:
            if piece.count:
                lattice(made, piece.extents, piece.local)[...] = lattice(words, piece.extents, piece.whole)
        return made

    def _write(self, writer: RangeWriter, offset: int, data: NDArray[np.uint8]) -> None:
        """What does not lie in memory as in the file is copied so, in steps: a copy costs less than the page cache."""
        past_cache = data.size >= 2 * MIN_DIRECT_NBYTES and self._out.store.capabilities.past_cache
        if not past_cache or (address_of(data.data) - offset) % PAGE == 0:
            if data.size:
                writer.write(offset, data.data)
            return
        step = self._buffers.take(min(_STEP_NBYTES, data.size), offset % PAGE)
        for start in range(0, data.size, step.size):
            part = step[: min(step.size, data.size - start)]
            part[...] = data[start : start + part.size]
            writer.write(offset + start, part.data)
        self._buffers.give_back(step)


class _Files:
    """Writers of files, a few of them open at a time. Any thread may use one."""

    def __init__(self, store: Store, sizes: Mapping[str, int]) -> None:
        self._store, self._sizes = store, sizes
        self._open: OrderedDict[str, RangeWriter] = OrderedDict()
        self._users: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def writer(self, path: str) -> Iterator[RangeWriter]:
        with self._lock:
            writer = self._open.pop(path, None) or self._store.open_writer(path, self._sizes[path])
            self._open[path] = writer
            self._users[path] = self._users.get(path, 0) + 1
            idle = [one for one in self._open if not self._users[one]]
            for one in idle[: max(0, len(self._open) - OPEN_FILES)]:
                self._give_up(one)
        try:
            yield writer
        finally:
            with self._lock:
                self._users[path] -= 1

    def settle(self) -> None:
        """What was written through the writers is durable."""
        with self._lock:
            for path in tuple(self._open):
                self._give_up(path)

    def abandon(self) -> None:
        """After an error, which nothing that closing reports may hide."""
        for writer in self._open.values():
            with suppress(CheckpointError):
                writer.close()
        self._open.clear()

    def _give_up(self, path: str) -> None:
        writer = self._open.pop(path)
        try:
            writer.sync()
        finally:
            writer.close()
