"""Bytes that several arrays need, held in memory between their first and their last use."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from elastickpt.convert.sections import Region, regions
from elastickpt.storage.store import RangeReader


@dataclass(slots=True)
class _Kept:
    region: Region
    waiting: set[int]
    data: bytearray | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Regions:
    """Of the leaves that are evaluated next. Any thread may read."""

    def __init__(self, leaves: Sequence[object]) -> None:
        self._numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        self._of_file: dict[str, list[_Kept]] = {}
        for region in regions(leaves):
            self._of_file.setdefault(region.file, []).append(_Kept(region, set(region.leaves)))
        for kept in self._of_file.values():
            kept.sort(key=lambda one: one.region.start)

    def reader(self, path: str, reader: RangeReader) -> RangeReader:
        """What reads a file: from memory what lies in its regions."""
        kept = self._of_file.get(path)
        return reader if kept is None else _Reader(reader, kept)

    def done(self, leaf: object) -> None:
        """The leaf is evaluated, and will not be again: what only it still needed is given up."""
        number = self._numbers.get(id(leaf))
        if number is None or not self._of_file:
            return
        for every in self._of_file.values():
            for one in every:
                one.waiting.discard(number)
                if not one.waiting:
                    one.data = None


class _Reader:
    def __init__(self, inner: RangeReader, kept: Sequence[_Kept]) -> None:
        self._inner, self._kept = inner, kept
        self._starts = [one.region.start for one in kept]

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    def read_into(self, offset: int, into: memoryview) -> None:
        place = bisect_right(self._starts, offset) - 1
        one = self._kept[place] if place >= 0 else None
        if one is None or offset + into.nbytes > one.region.stop:
            self._inner.read_into(offset, into)
            return
        start = one.region.start
        with one.lock:
            if one.data is None:
                one.data = bytearray(one.region.stop - start)
                self._inner.read_into(start, memoryview(one.data))
            data = one.data
        into.cast("B")[:] = memoryview(data)[offset - start : offset - start + into.nbytes]

    def close(self) -> None:
        self._inner.close()
