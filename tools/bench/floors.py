"""What this machine can do at best with the same bytes: raw files from warm aligned memory, and a copy in memory.

Raw is one file per rank; the floor is the better median of buffered and O_DIRECT, chosen when reporting.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from .records import Durability
from .state import State, pieces

Way = Literal["buffered", "direct"]
BLOCK_NBYTES = 16 << 20
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

    def __init__(self, buffer: WarmBuffer, way: Way) -> None:
        self.name = f"raw {way}"
        self.version = ""
        self.settings = f"{way} pwrite of {BLOCK_NBYTES >> 20} MiB blocks, fsync, one file per rank"
        self._buffer = buffer
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
            moved = move(self._buffer.view[offset : min(offset + BLOCK_NBYTES, self._nbytes)], offset)
            if moved <= 0:
                raise OSError(f"a raw file ended at {offset} of {self._nbytes} bytes")
            offset += moved


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
