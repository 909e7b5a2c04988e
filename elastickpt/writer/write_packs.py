"""Writes a pack: many pieces, one file. What lies close together in it is put together in memory, and written at once.

A span is what is written at once: several pieces of at most `span_nbytes` of the pack together, gaps included, which are zero,
or up to `ROW_NBYTES` of a large one. On a device it goes past the page cache from memory that lies like the file, modulo the
page: where it was staged, or copied to a huge page. So several threads put together while others wait for their writes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from elastickpt.errors import CapabilityMissing, CheckpointError
from elastickpt.format.digest import block_checksums, whole_checksums
from elastickpt.format.memory_views import address_of
from elastickpt.ranks.threads import Pool
from elastickpt.storage.kernel import HUGE_PAGE, MIN_DIRECT_NBYTES, huge_buffer
from elastickpt.storage.store import RangeWriter, Store
from elastickpt.writer.arena_plan import ROWS_APART, PackPart, PackSpan
from elastickpt.writer.plans import BLOCK_NBYTES, PAGE, PlannedFile
from elastickpt.writer.write_files import UNIT_NBYTES, Bytes, Checksums, Source, WrittenFolder, copy_hashed, write_hashed

THREADS = 4
# What is put together fits a huge page, so that it is one segment for the device: 100 MB of two ranks on ext4 take 48 ms, from
# pages of 4 KiB anywhere 60 to 68.
SPAN_NBYTES = HUGE_PAGE
SPAN_IN_MEMORY_NBYTES = 1 << 20  # what is copied twice stays in the processor's cache between
TOGETHER_NBYTES = 64 << 10  # of a part in memory: below this a call of its own costs more than the copy
MANY_GAPS = 100  # in a span: to fill all of it with zeros takes less

# Buffers of packs that were written: to fault in new ones takes a third as long as to write so much to a device. Popping and
# extending a list are one step each, whatever threads do.
_KEPT: list[Bytes] = []


def span_nbytes(store: Store) -> int:
    """How much of a pack is best written there at once, at most."""
    return SPAN_NBYTES if store.capabilities.past_cache else SPAN_IN_MEMORY_NBYTES


def write_pack(
    target: WrittenFolder, pack: PlannedFile, spans: Sequence[PackSpan], source: Source, *, block_nbytes: int = BLOCK_NBYTES
) -> Checksums:
    """Writes spans of one pack, in their order; returns the checksums of their blocks, in order. Blocking.

    With `target.sync` "file" they are durable on return, through the descriptor that wrote them. Raises StorageFailed kinds;
    the file may then hold anything, and nothing that failed to sync is synced again.
    """
    able = target.store.capabilities
    checksums = np.empty(sum(span.blocks for span in spans), dtype=np.uint64)
    writer = _open(target, pack)
    work = _Work(target, writer, source, checksums, block_nbytes)
    try:
        with Pool("elastickpt-write", 1 if able.sequential_only or not able.past_cache else THREADS) as pool:
            pool.share_out(spans, work.carry_out)
        if isinstance(writer, _FrontToBack):
            writer.fill_to(pack.nbytes)
        if target.sync == "file":
            writer.sync()
    except BaseException:
        with suppress(CheckpointError):  # which may not hide what failed
            writer.close()
        raise
    work.let_go()
    writer.close()
    return checksums


def _open(target: WrittenFolder, pack: PlannedFile) -> RangeWriter:
    path = target.path(pack.path)
    target.store.make_directories(path.rpartition("/")[0])
    writer = target.store.open_writer(path, pack.nbytes)
    return _FrontToBack(writer, path) if target.store.capabilities.sequential_only else writer


class _Work:
    """One call of `write_pack` under way: threads take spans, in order."""

    def __init__(
        self, target: WrittenFolder, writer: RangeWriter, source: Source, checksums: Checksums, block_nbytes: int
    ) -> None:
        self._block_nbytes = block_nbytes
        self._target, self._writer, self._source, self._checksums = target, writer, source, checksums
        self._past_cache = target.store.capabilities.past_cache
        self._of_thread = threading.local()
        self._taken: dict[int, Bytes] = {}

    def carry_out(self, span: PackSpan) -> None:
        parts = span.parts
        if len(parts) == 1 and self._goes_alone(parts[0]):
            self._write_alone(parts[0])
        elif not self._past_cache and all(part.stop - part.start >= TOGETHER_NBYTES and part.run.in_a_row for part in parts):
            for part in parts:
                self._write_alone(part)
        elif span.groups:
            self._write_groups(span)
        elif len(parts) == 1 and parts[0].run.in_a_row:
            self._write_row(parts[0])
        else:
            self._write_rows(parts)
        self._target.watch(span.nbytes)

    def _goes_alone(self, part: PackPart) -> bool:
        return not self._past_cache or part.stop - part.start < MIN_DIRECT_NBYTES or part.run.row_stride > self._widest(part)

    def _widest(self, part: PackPart) -> int:
        return part.run.nbytes if part.run.in_a_row else ROWS_APART * part.run.row_nbytes

    def _take(self, part: PackPart) -> Bytes:
        """The part's bytes, which are hashed."""
        data = self._source.take(part.at, part.start, part.stop)
        self._found(part.block, whole_checksums(data.data, self._block_nbytes))
        return data

    def _found(self, block: int, checksums: Sequence[int]) -> None:
        self._checksums[block : block + len(checksums)] = checksums

    def _write_alone(self, part: PackPart) -> None:
        if part.run.in_a_row:
            data = self._source.take(part.at, part.start, part.stop)
            return self._found(part.block, write_hashed(self._writer, part.begin, data, self._block_nbytes))
        data, position = self._take(part), part.start
        while position < part.stop:
            stop = min((position // part.run.row_nbytes + 1) * part.run.row_nbytes, part.stop)
            self._writer.write(part.run.place(position), data[position - part.start : stop - part.start].data)
            position = stop
        return None

    def _write_groups(self, span: PackSpan) -> None:
        """Several pieces: the source copies some, which are hashed where they then lie, and then the next."""
        begin = span.parts[0].begin
        into = self._buffer(begin, span.parts[-1].end)
        if len(span.gaps) > MANY_GAPS:
            into[:] = 0
        else:
            for low, high in span.gaps:
                into[low:high] = 0
        for group in span.groups:
            self._source.gather(group.slices, group.places, into)
            self._found(group.block, block_checksums(into.data, group.within))
        self._writer.write(begin, into.data)

    def _write_row(self, part: PackPart) -> None:
        data = self._source.take(part.at, part.start, part.stop)
        if (address_of(data.data) - part.begin) % PAGE == 0:  # it lies like the file already
            self._found(part.block, whole_checksums(data.data, self._block_nbytes))
            return self._writer.write(part.begin, data.data)
        for start in range(0, data.size, SPAN_NBYTES):  # a huge page at a time
            some = data[start : start + SPAN_NBYTES]
            begin = part.begin + start
            into = self._buffer(begin, begin + some.size)
            self._found(part.block + start // self._block_nbytes, copy_hashed(some, into, self._block_nbytes))
            self._writer.write(begin, into.data)
        return None

    def _write_rows(self, parts: tuple[PackPart, ...]) -> None:
        """What has gaps inside, and what lies close to it."""
        begin = filled = parts[0].begin
        into = self._buffer(begin, parts[-1].end)
        for part in parts:
            into[filled - begin : part.begin - begin] = 0
            _lay_rows(part, self._take(part), into[part.begin - begin : part.end - begin])
            filled = part.end
        self._writer.write(begin, into.data)

    def _buffer(self, begin: int, end: int) -> Bytes:
        """This thread's memory for [begin, end) of the pack, which lies like the file modulo the page."""
        shift = begin % PAGE
        nbytes = shift + end - begin
        found: Bytes | None = getattr(self._of_thread, "buffer", None)
        if found is None and _KEPT:
            found = _KEPT.pop()
        if found is None or found.size < nbytes:
            found = huge_buffer(max(nbytes, SPAN_NBYTES))
        self._of_thread.buffer = self._taken[threading.get_ident()] = found
        return found[shift:nbytes]

    def let_go(self) -> None:
        """Nobody writes any more: the next pack may have the buffers."""
        fit = [buffer for buffer in self._taken.values() if buffer.size <= SPAN_NBYTES + PAGE]
        _KEPT.extend(fit[: max(0, THREADS - len(_KEPT))])
        self._taken.clear()


def _lay_rows(part: PackPart, data: Bytes, into: Bytes) -> None:
    """The part's rows as they lie in the pack, zeros between; `into` begins at its first byte."""
    if part.run.in_a_row:
        into[:] = data
        return
    row, stride = part.run.row_nbytes, part.run.row_stride
    into[:] = 0
    done = 0
    while done < data.size:
        position = part.start + done
        at, inside = part.run.place(position) - part.begin, position % row
        rows = (data.size - done - 1) // row if inside == 0 else 0  # the last one is shorter than its stride
        if rows:
            into[at : at + rows * stride].reshape(rows, stride)[:, :row] = data[done : done + rows * row].reshape(rows, row)
            done += rows * row
        else:
            nbytes = min(row - inside, data.size - done)
            into[at : at + nbytes] = data[done : done + nbytes]
            done += nbytes


class _FrontToBack:
    """A writer of a file that takes bytes in their order alone: what lies between is written as zeros."""

    def __init__(self, inner: RangeWriter, path: str) -> None:
        self._inner, self._path, self._end = inner, path, 0

    def write(self, offset: int, data: memoryview) -> None:
        if offset < self._end:
            raise CapabilityMissing(
                f"ranged_writes: {self._path}: byte {offset} after byte {self._end}, in a store that takes them in order alone"
            )
        self.fill_to(offset)
        self._inner.write(offset, data)
        self._end = offset + data.nbytes

    def fill_to(self, end: int) -> None:
        """Zeros up to there."""
        while self._end < end:
            zeros = memoryview(bytes(min(end - self._end, UNIT_NBYTES)))
            self._inner.write(self._end, zeros)
            self._end += len(zeros)

    def sync(self) -> None:
        self._inner.sync()

    def close(self) -> None:
        self._inner.close()
