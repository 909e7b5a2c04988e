"""Staging: from live tensors to an arena, and nothing else. This is what stalls training.

    stager = Stager(prepared, arena)           # once for a plan and an arena
    stager.stage(0, sources)                   # each save: a copy of what this rank writes, laid out as it will be written

Tensors on a device are not copied here but by `training.device_staging`, into the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from elastickpt.errors import LimitExceeded
from elastickpt.save.gather import Bytes, Elements, flat_bytes, gather, part_of
from elastickpt.writer.arena import Arena
from elastickpt.writer.plans import PlannedPiece
from elastickpt.writer.prepared import Prepared
from elastickpt.writer.rounds import Slice

MIN_THREADED_NBYTES = 32 << 20  # below this a second thread costs more to wake than it copies meanwhile
PART_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class StagedSlice:
    """A slice of a piece and its place in the arena, shape=[stop - start] bytes."""

    piece: PlannedPiece
    at: Slice
    into: Bytes


def slices_of(prepared: Prepared, arena: Arena, number: int) -> tuple[StagedSlice, ...]:
    """The slices of a round with their places. Raises LimitExceeded for an arena that is too small."""
    found = prepared.rounds[number]
    if arena.nbytes < found.nbytes:
        raise LimitExceeded(f"round {number} needs an arena of {found.nbytes} bytes, found one of {arena.nbytes}")
    files, memory = prepared.plan.files, arena.memory
    return tuple(
        StagedSlice(files[at.file].pieces[at.piece], at, memory[at.offset : at.offset + at.stop - at.start])
        for at in found.slices
    )


class Stager:
    """Copies the rounds of one plan into one arena, again and again; keeps views of the arena, so drop it before the arena.

    `threads`: how many copy; see `tools/bench` for what it brings, which is nothing where one core fills the memory bus.
    """

    def __init__(self, prepared: Prepared, arena: Arena, *, threads: int = 1) -> None:
        self._arena = arena
        self._rounds = [slices_of(prepared, arena, number) for number in range(len(prepared.rounds))]
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="elastickpt-stage") if threads > 1 else None
        self._threads = threads

    @property
    def rounds(self) -> int:
        """More than one: the arena is smaller than what is saved, and all but the last must be written before it returns."""
        return len(self._rounds)

    def stage(self, number: int, sources: Sequence[Elements]) -> int:
        """Copies round `number`; returns its bytes. Blocking. `sources[i]` are the elements of held array i, on the host.

        On return the live tensors may change. Raises Refused as long as a writer has the arena.
        """
        self._arena.require_free()
        slices = self._rounds[number]
        nbytes = sum(one.at.stop - one.at.start for one in slices)
        if self._pool is None or nbytes < MIN_THREADED_NBYTES:
            for one in slices:
                copy(one, sources)
            return nbytes
        parts = iter([part for one in slices for part in _parts(one, sources)])

        def work() -> None:
            for part in parts:  # a list's iterator gives each part to one thread
                part()

        others = [self._pool.submit(work) for _ in range(self._threads - 1)]
        work()
        for other in others:
            other.result()
        return nbytes

    def close(self) -> None:
        """Ends the threads and lets go of the arena."""
        self._rounds = []
        if self._pool is not None:
            self._pool.shutdown()


def copy(one: StagedSlice, sources: Sequence[Elements]) -> None:
    """The slice of live elements, in C order of its piece, stands in its place."""
    part = part_of(sources[one.piece.array], one.piece.local)
    if one.into.size == one.piece.run.nbytes:
        np.copyto(one.into.view(part.dtype).reshape(part.shape), part)
    elif (flat := flat_bytes(part)) is not None:
        np.copyto(one.into, flat[one.at.start : one.at.stop])
    else:
        gather(part, one.at.start, one.into)


def _parts(one: StagedSlice, sources: Sequence[Elements]) -> list[Callable[[], None]]:
    """The same work in parts that threads can share."""
    flat = flat_bytes(part_of(sources[one.piece.array], one.piece.local)) if one.into.size > PART_NBYTES else None
    if flat is None:
        return [lambda: copy(one, sources)]
    live = flat[one.at.start : one.at.stop]

    def part(begin: int) -> Callable[[], None]:
        return lambda: np.copyto(one.into[begin : begin + PART_NBYTES], live[begin : begin + PART_NBYTES])

    return [part(begin) for begin in range(0, one.into.size, PART_NBYTES)]
