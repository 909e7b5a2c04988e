"""A blocking write of one rank's plan straight from its local tensors: nothing is staged.

A unit that goes past the page cache is gathered into a cache-sized, page-congruent buffer, unless the memory is fit as it is;
what is contiguous and goes through the cache is taken in place. Memory beside the state: threads × UNIT_NBYTES.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np

from elastickpt.saving.gather import Bytes, Elements, flat_bytes, gather, part_of
from elastickpt.storage.direct import MIN_DIRECT_NBYTES, address_of, aligned_buffer
from elastickpt.storage.store import Durability, Store
from elastickpt.writer.carry import (
    Checksums,
    Target,
    make_durable,
    sync_way,
    unwatched,
    write_round,
)
from elastickpt.writer.plans import Document, WritePlan
from elastickpt.writer.rounds import PAGE, Slice, whole_pieces


def write_plan(
    store: Store,
    root: str,
    plan: WritePlan,
    documents: Sequence[Document],
    sources: Sequence[Elements],
    *,
    durability: Durability,
) -> Checksums:
    """Carries out the whole plan below the folder `root`; returns the checksums of its pieces' blocks, in order. Blocking.

    `sources[i]` are the elements of held array i. With durability "power" all bytes and names are durable on return. Raises
    StorageFailed kinds; files may then hold anything, and nothing that failed to sync is synced again.
    """
    way = sync_way(store, len(plan.files) + len(plan.documents), durability=durability)
    target = Target(store, root, way, unwatched)
    live = _Live(plan, sources, _congruent_nbytes(store))
    checksums = write_round(target, plan, documents, whole_pieces(plan.files), live, create=store.create)
    make_durable(target, plan, documents)
    return checksums


def _congruent_nbytes(store: Store) -> float:
    """From how many bytes on a range goes past the page cache of this store, and memory has to lie like the file."""
    return MIN_DIRECT_NBYTES if store.capabilities.past_cache else math.inf


class _Live:
    """The bytes of local tensors."""

    def __init__(self, plan: WritePlan, sources: Sequence[Elements], congruent_nbytes: float) -> None:
        self._plan = plan
        self._sources = sources
        self._congruent_nbytes = congruent_nbytes  # from so many on memory must lie like the file
        self._buffers = threading.local()

    def take(self, at: Slice, start: int, stop: int) -> Bytes:
        """The bytes, in place where the memory is contiguous and congruent to the file, else gathered."""
        piece = self._plan.files[at.file].pieces[at.piece]
        part = part_of(self._sources[piece.array], piece.local)
        flat = flat_bytes(part)
        offset = piece.run.offset + start
        if flat is not None:
            data = flat[start:stop]
            if stop - start < self._congruent_nbytes or (address_of(data.data) - offset) % PAGE == 0:
                return data
        shift = offset % PAGE
        into = self._buffer(shift + stop - start)[shift:]
        if flat is not None:
            np.copyto(into, flat[start:stop])
        else:
            gather(part, start, into)
        return into

    def _buffer(self, nbytes: int) -> Bytes:
        """This thread's page-aligned memory, so many bytes of it."""
        found: Bytes | None = getattr(self._buffers, "unit", None)
        if found is None or found.size < nbytes:
            found = aligned_buffer(nbytes)
            self._buffers.unit = found
        return found[:nbytes]
