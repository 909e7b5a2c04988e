"""The arenas of one rank: each save takes a slot, fills its arena, and gives it back when its writer has written.

free --reserve--> taken --stage--> filled --submitted, written, or given up--> free
                                             a writer that could not be reaped: a new arena with the next save
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from elastickpt.errors import SaveSkipped
from elastickpt.ranks.threads import Pool
from elastickpt.saving.staging import Stager, slices_of
from elastickpt.training.device import Copies, DeviceCopier
from elastickpt.training.held import HeldArray
from elastickpt.writer.arena import Arena

Forget = Callable[[Arena], None]


class ArenaSlot:
    """Room for one save. Its arena is kept from save to save, and made anew only for a plan that needs a larger one.

    `forget` tells the writer of an arena that is given up.
    """

    def __init__(self, pool: Arenas, *, copiers: Pool | None, forget: Forget, copier: DeviceCopier) -> None:
        self._pool = pool
        self._copiers = copiers
        self._forget = forget
        self._copier = copier
        self._arena: Arena | None = None
        self._fitted: Stager | None = None
        self._copies: dict[str, Copies] = {}
        self.taken = False

    @property
    def arena(self) -> Arena:
        if self._arena is None:
            raise ValueError("nothing was staged here")
        return self._arena

    @property
    def lent(self) -> bool:
        """Whether a writer reads its arena."""
        return self._arena is not None and self._arena.lent

    def fit(self, stager: Stager) -> None:
        """The arena is there, empty, and as large as the plan needs. Raises NoSpace, and Refused while a writer reads it."""
        arena, prepared = self._arena, stager.prepared
        if arena is not None and (arena.retired or arena.nbytes < prepared.arena_nbytes):
            self.drop()
            arena = None
        if arena is None:
            self._arena = arena = Arena.create(prepared.arena_nbytes)
        arena.empty()
        self._fitted = stager

    def stage(self, number: int, held: Sequence[HeldArray]) -> Copies | None:
        """Copies a portion of the plan that fits; what goes on beside training, if anything does. The device's own copies come
        first, so that they run while the host's are made."""
        stager = self._fitted
        if stager is None:
            raise ValueError("no plan was fitted to this arena")
        devices = [self._copier.device(one) for one in held]
        first = next(filter(None, devices), None)
        if first is None:
            stager.stage(self.arena, number, held, (), self._copiers)
            return None
        skip = frozenset(array for array, device in enumerate(devices) if device == first)
        if first not in self._copies:
            self._copies[first] = self._copier.copies(self.arena.memory, first)
        copies = self._copies[first]
        copies.begin()
        for one in slices_of(stager.prepared, self.arena, number):
            if one.piece.array in skip:
                local = tuple(slice(low, high) for low, high in zip(one.piece.local.start, one.piece.local.stop, strict=True))
                copies.copy(held[one.piece.array].tensor[local], one.at.start, one.into)
        copies.end()
        stager.stage(self.arena, number, held, skip, self._copiers)
        return copies

    def copies_nothing_beside(self, held: Sequence[HeldArray]) -> bool:
        """Whether all of it is copied by `stage` itself, which then says on the way how far the arena is filled."""
        return not any(self._copier.device(one) for one in held)

    def release(self) -> None:
        """Free for the next save."""
        self._pool.release(self)

    def drop(self) -> None:
        """Gives the arena up."""
        self._fitted = None
        for copies in self._copies.values():
            copies.close()
        self._copies = {}
        if self._arena is not None:
            self._forget(self._arena)
            self._arena.close()
            self._arena = None


class Arenas:
    """As many slots as saves may be under way at once."""

    def __init__(self, count: int, *, threads: int, forget: Forget, copier: DeviceCopier) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._copiers = Pool("elastickpt-stage", threads) if threads > 1 else None
        self._slots = [ArenaSlot(self, copiers=self._copiers, forget=forget, copier=copier) for _ in range(count)]

    def reserve(self, *, limit_s: float) -> ArenaSlot:
        """A free slot. Blocking, at most `limit_s`; then raises SaveSkipped."""
        with self._changed:
            if not self._changed.wait_for(lambda: not all(slot.taken for slot in self._slots), limit_s):
                raise SaveSkipped(
                    f"none of the {len(self._slots)} staging arenas of this rank became free within {limit_s:g} s: "
                    "earlier saves are still being written; save less often, or allow more arenas"
                )
            slot = next(one for one in self._slots if not one.taken)
            slot.taken = True
            return slot

    def release(self, slot: ArenaSlot) -> None:
        """Free for the next save; after `close` its memory goes."""
        with self._changed:
            slot.taken = False
            if self._closed:
                slot.drop()
                self._end_copiers()
            self._changed.notify_all()

    def close(self) -> None:
        """Gives up the memory of all slots, of those that a save has when it gives them back."""
        with self._changed:
            self._closed = True
            for slot in self._slots:
                if not slot.taken:
                    slot.drop()
            self._end_copiers()

    def _end_copiers(self) -> None:
        if self._copiers is not None and not any(slot.taken for slot in self._slots):
            self._copiers.close()
