"""What this machine can do at best with the same bytes: raw files from warm aligned memory, and a copy in memory.

Raw is one file per rank; the floor is the best median of its ways, chosen when reporting. Own is the same from and into the
memory that the state's tensors have, which lie as torch laid them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from .records import Durability
from .state import State, pieces

Way = Literal["buffered", "direct"]
BLOCK_NBYTES, SMALL_BLOCK_NBYTES = 16 << 20, 1 << 20
BOUNCE_NBYTES = 8 << 20
_PAGE_NBYTES = 4096


class WarmBuffer:
    """Page-aligned memory of at least `nbytes`, every page touched."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.padded_nbytes = max(_PAGE_NBYTES, -(-nbytes // _PAGE_NBYTES) * _PAGE_NBYTES)
        self._map = mmap.mmap(-1, self.padded_nbytes)
        self.view = memoryview(self._map)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.tensor.fill_(1)


class RawFiles:
    """One file per rank, written and read in large blocks, synced. O_DIRECT rounds the size up to whole pages."""

    durability: Durability = "floor"

    def __init__(self, buffer: WarmBuffer, way: Way, block_nbytes: int = BLOCK_NBYTES) -> None:
        self.name = f"raw {way}" if block_nbytes == BLOCK_NBYTES else f"raw {block_nbytes >> 20} MiB"
        self.version = ""
        self.settings = f"{way} pwrite of {block_nbytes >> 20} MiB blocks, fsync, one file per rank"
        self._buffer, self._block_nbytes = buffer, block_nbytes
        self._direct = os.O_DIRECT if way == "direct" else 0
        self._nbytes = buffer.padded_nbytes if way == "direct" else buffer.nbytes

    def save(self, state: State, path: Path) -> None:
        path.mkdir(exist_ok=True)
        descriptor = os.open(self._file(path), os.O_CREAT | os.O_WRONLY | self._direct)
        try:
            self._in_blocks(lambda block, offset: os.pwrite(descriptor, block, offset))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def load(self, state: State, path: Path) -> None:
        descriptor = os.open(self._file(path), os.O_RDONLY | self._direct)
        try:
            self._in_blocks(lambda block, offset: os.preadv(descriptor, [block], offset))
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """The buffer belongs to the job."""

    def _file(self, path: Path) -> Path:
        return path / f"{dist.get_rank()}.raw"

    def _in_blocks(self, move: Callable[[memoryview, int], int]) -> None:
        offset = 0
        while offset < self._nbytes:
            moved = move(self._buffer.view[offset : min(offset + self._block_nbytes, self._nbytes)], offset)
            if moved <= 0:
                raise OSError(f"a raw file ended at {offset} of {self._nbytes} bytes")
            offset += moved


class OwnMemory:
    """One file per rank from and into the state's tensors: vectors of them, or by O_DIRECT through a small aligned buffer."""

    durability: Durability = "floor"

    def __init__(self, state: State, way: Way) -> None:
        self.name = f"own {way}"
        self.version = ""
        through = "pwritev of the state's tensors" if way == "buffered" else f"a copy through {BOUNCE_NBYTES >> 20} MiB"
        self.settings = f"{way}, {through}, fsync, one file per rank"
        self._views = [piece.local.reshape(-1).view(torch.uint8).numpy().data for piece in pieces(state)]
        self._bounce = WarmBuffer(BOUNCE_NBYTES) if way == "direct" else None
        self._direct = os.O_DIRECT if way == "direct" else 0

    def save(self, state: State, path: Path) -> None:
        path.mkdir(exist_ok=True)
        descriptor = os.open(path / f"{dist.get_rank()}.raw", os.O_CREAT | os.O_WRONLY | self._direct)
        try:
            for offset, vector in _vectors(self._views):
                if self._bounce is None:
                    _require_all(os.pwritev(descriptor, vector, offset), sum(map(len, vector)))
                else:
                    padded = _fill(self._bounce, vector)
                    _require_all(os.pwrite(descriptor, padded, offset), len(padded))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def load(self, state: State, path: Path) -> None:
        descriptor = os.open(path / f"{dist.get_rank()}.raw", os.O_RDONLY | self._direct)
        try:
            for offset, vector in _vectors(self._views):
                wanted = sum(map(len, vector))
                if self._bounce is None:
                    _require_all(os.preadv(descriptor, vector, offset), wanted)
                else:
                    _require_all(os.preadv(descriptor, [self._bounce.view[: _padded(wanted)]], offset), wanted)
                    _empty(self._bounce, vector)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """The memory belongs to the state."""


def _vectors(views: Sequence[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """The views in order, as vectors of exactly `BOUNCE_NBYTES` but for the last, and where each begins in the file."""
    offset, vector, nbytes = 0, list[memoryview](), 0
    for view in views:
        while len(view):
            part = view[: BOUNCE_NBYTES - nbytes]
            vector.append(part)
            nbytes, view = nbytes + len(part), view[len(part) :]
            if nbytes == BOUNCE_NBYTES:
                yield offset, vector
                offset, vector, nbytes = offset + nbytes, [], 0
    if vector:
        yield offset, vector


def _padded(nbytes: int) -> int:
    return -(-nbytes // _PAGE_NBYTES) * _PAGE_NBYTES


def _fill(bounce: WarmBuffer, vector: Sequence[memoryview]) -> memoryview:
    at = 0
    for part in vector:
        bounce.view[at : at + len(part)] = part
        at += len(part)
    return bounce.view[: _padded(at)]


def _empty(bounce: WarmBuffer, vector: Sequence[memoryview]) -> None:
    at = 0
    for part in vector:
        part[:] = bounce.view[at : at + len(part)]
        at += len(part)


def _require_all(moved: int, wanted: int) -> None:
    if moved < wanted:
        raise OSError(f"a raw file took or gave {moved} of {wanted} bytes")


class MemoryCopy:
    """Copies the state into the warm buffer: the least that staging can cost."""

    name = "memcpy"
    version = ""
    settings = "torch copy of every local tensor into one warm buffer, one thread per rank"
    durability: Durability = "floor"

    def __init__(self, buffer: WarmBuffer) -> None:
        self._buffer = buffer

    def save(self, state: State, path: Path) -> None:
        offset = 0
        for piece in pieces(state):
            flat = piece.local.reshape(-1).view(torch.uint8)
            self._buffer.tensor[offset : offset + flat.numel()].copy_(flat)
            offset += flat.numel()

    def load(self, state: State, path: Path) -> None:
        raise NotImplementedError("a copy has nothing to load")

    def close(self) -> None:
        """The buffer belongs to the job."""
