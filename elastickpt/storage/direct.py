"""Past the page cache: memory that O_DIRECT takes, and which part of a range it may have."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elastickpt.storage.kernel import direct_alignment

MIN_DIRECT_NBYTES = 1 << 20  # below this the edges and the extra call cost more than the copy into the page cache
MIN_DIRECT_READ_NBYTES = 64 << 10  # of one read in a file of MIN_DIRECT_NBYTES; small files are read ahead whole


def aligned_buffer(nbytes: int) -> npt.NDArray[np.uint8]:
    """shape=[nbytes]: zeroed memory that starts at a page and is faulted in; freed with its last view (`.data`)."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1), flags=flags), dtype=np.uint8, count=nbytes)


def address_of(view: memoryview) -> int:
    """The address of the view's first byte; 0 for an empty view."""
    if not view.nbytes:
        return 0
    address: int = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
    return address


def aligned_inside(offset: int, view: memoryview, *, alignment: int) -> tuple[int, int]:
    """The part [start, stop) of `view`, in bytes, that O_DIRECT may move to or from `offset + start`; (0, 0) for none.

    There is one only if the view's address and `offset` are equal modulo `alignment`: memory and file are then aligned
    at the same bytes. One shorter than MIN_DIRECT_NBYTES is left alone.
    """
    if (address_of(view) - offset) % alignment:
        return 0, 0
    start = -offset % alignment
    stop = (offset + view.nbytes) // alignment * alignment - offset
    return (start, stop) if stop - start >= MIN_DIRECT_NBYTES else (0, 0)


@dataclass(frozen=True, slots=True)
class DirectDescriptor:
    """A second descriptor of a file that is open already, past the page cache."""

    descriptor: int
    alignment: int


def open_direct(path: str, flags: int, *, beside: int) -> DirectDescriptor | None:
    """A direct descriptor of the file behind `beside`, or None where this file or file system has none.

    Also None when `path` is another file by now (the draft was renamed): going on through `beside` is always right.
    """
    alignment = direct_alignment(beside)
    if not alignment:
        return None
    try:
        descriptor = os.open(path, flags | os.O_DIRECT | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    if os.path.sameopenfile(descriptor, beside):
        return DirectDescriptor(descriptor, alignment)
    os.close(descriptor)
    return None
