"""A blocking write of one rank's plan straight from its local tensors: nothing is staged.

A unit is gathered into a cache-sized, page-congruent buffer, or taken in place where the memory already is fit. Memory beside
the state: threads × UNIT_NBYTES.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from elastickpt.save.gather import Bytes, Elements, flat_bytes, gather, part_of
from elastickpt.storage.direct import address_of, aligned_buffer
from elastickpt.storage.store import Durability, Store
from elastickpt.writer.carry import (
    UNIT_NBYTES,
    Checksums,
    Target,
    make_durable,
    make_folders,
    sync_way,
    unwatched,
    write_slices,
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
    make_folders(target, plan)
    for document in documents:
        store.create(target.path(document.path), document.content)
    checksums = write_slices(target, plan.files, whole_pieces(plan.files), _Live(plan, sources))
    make_durable(target, plan, documents)
    return checksums


class _Live:
    """The bytes of local tensors."""

    def __init__(self, plan: WritePlan, sources: Sequence[Elements]) -> None:
        self._plan = plan
        self._sources = sources
        self._buffers = threading.local()

    def take(self, at: Slice, start: int, stop: int) -> Bytes:
        """The bytes, in place where the memory is contiguous and congruent to the file, else gathered."""
        piece = self._plan.files[at.file].pieces[at.piece]
        part = part_of(self._sources[piece.array], piece.local)
        flat = flat_bytes(part)
        offset = piece.run.offset + start
        if flat is not None:
            data = flat[start:stop]
            if stop - start < PAGE or (address_of(data.data) - offset) % PAGE == 0:
                return data
        if not hasattr(self._buffers, "unit"):
            self._buffers.unit = aligned_buffer(UNIT_NBYTES + PAGE)
        shift = offset % PAGE
        into: Bytes = self._buffers.unit[shift : shift + stop - start]
        if flat is not None:
            np.copyto(into, flat[start:stop])
        else:
            gather(part, start, into)
        return into
