"""The bytes of one rank's local tensors, as a source for what is written of them: nothing is staged.

A unit that goes past the page cache is gathered into a cache-sized, page-congruent buffer, unless the memory is fit as it is;
what is contiguous and goes through the cache is taken in place. Memory beside the state: threads × UNIT_NBYTES.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np

from elastickpt.saving.gather import Bytes, Elements, flat_bytes, gather, part_of
from elastickpt.storage.kernel import MIN_DIRECT_NBYTES, address_of, aligned_buffer
from elastickpt.storage.store import Store
from elastickpt.writer.plans import PAGE, Slice, WritePlan


class LiveTensors:
    """A `carry.Source` for a store. `elements[i]` are those of held array i, in host memory."""

    def __init__(self, plan: WritePlan, elements: Sequence[Elements], store: Store) -> None:
        self._plan = plan
        self._elements = elements
        # from so many bytes on a range goes past the page cache of this store, and memory has to lie like the file
        self._congruent_nbytes = MIN_DIRECT_NBYTES if store.capabilities.past_cache else math.inf
        self._buffers = threading.local()

    def take(self, at: Slice, start: int, stop: int) -> Bytes:
        """The bytes, in place where the memory is contiguous and congruent to the file, else gathered."""
        piece = self._plan.files[at.file].pieces[at.piece]
        part = part_of(self._elements[piece.array], piece.local)
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
