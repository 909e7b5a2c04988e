"""What one file per array costs by itself: `python -m tools.bench.bare FOLDER`.

The folders and files of a save by two ranks, each its half of every array, made and written by a bare loop of system calls and
synced at once: no agreement, checksums, proof or records. In turn with one raw file per rank. Neither is a contestant: they
bound what any library can do that gives each array a file.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from math import prod
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from uuid import uuid4

from elastickpt.storage.kernel import sync_file_system

from .floors import WarmBuffer
from .state import ITEMS, rows_of, shapes_for

NBYTES, RANKS, REPEATS = 100_000_000, 2, 9
BLOCK_NBYTES, DIRECT_NBYTES, PAGE_NBYTES = 16 << 20, 1 << 20, 4096
DOCUMENT = b"x" * 600

Part = tuple[int, int, int]  # of one array: bytes of the file, first and last byte of this rank's rows


def parts(rank: int) -> list[Part]:
    """This rank's part of every array."""
    found = []
    for shape in shapes_for(NBYTES).values():
        row = 4 * prod(shape[1:])
        start, stop = rows_of(shape[0], rank=rank, ranks=RANKS)
        found.append((row * shape[0], row * start, row * stop))
    return found * len(ITEMS)


def raw(folder: Path, rank: int, mine: Sequence[Part], data: memoryview) -> None:
    """One file of whole pages, past the page cache."""
    nbytes = sum(stop - start for _, start, stop in mine) // PAGE_NBYTES * PAGE_NBYTES
    descriptor = os.open(folder / str(rank), os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    for at in range(0, nbytes, BLOCK_NBYTES):
        os.pwrite(descriptor, data[at : min(at + BLOCK_NBYTES, nbytes)], at)
    os.fsync(descriptor)
    os.close(descriptor)


def bare(folder: Path, rank: int, mine: Sequence[Part], data: memoryview) -> None:
    """A folder, a chunk file and a document for each array; the big aligned inside of a part past the page cache."""
    for number, (nbytes, start, stop) in enumerate(mine):
        own = folder / str(number)
        own.mkdir(exist_ok=True)
        chunk = os.open(own / "c.0.0", os.O_CREAT | os.O_WRONLY)
        os.ftruncate(chunk, nbytes)
        low, high = -(-start // PAGE_NBYTES) * PAGE_NBYTES, stop // PAGE_NBYTES * PAGE_NBYTES
        if high - low >= DIRECT_NBYTES:
            direct = os.open(own / "c.0.0", os.O_WRONLY | os.O_DIRECT)
            os.pwrite(direct, data[: high - low], low)
            os.close(direct)
            os.pwrite(chunk, data[: low - start], start)
            os.pwrite(chunk, data[: stop - high], high)
        else:
            os.pwrite(chunk, data[: stop - start], start)
        os.close(chunk)
        if number % RANKS == rank:
            (own / "zarr.json").write_bytes(DOCUMENT)
    opened = os.open(folder, os.O_RDONLY)
    sync_file_system(opened)
    os.close(opened)


WAYS: tuple[Callable[[Path, int, Sequence[Part], memoryview], None], ...] = (raw, bare)


def take_turns(top: Path, rank: int, together: Barrier) -> None:
    """Every way in turn, after one turn that does not count; rank 0 prints."""
    mine = parts(rank)
    data = WarmBuffer(NBYTES).view
    taken: dict[str, list[float]] = {way.__name__: [] for way in WAYS}
    for repeat in range(REPEATS + 1):
        for way in WAYS:
            folder = top / f"{way.__name__}-{repeat}"
            if rank == 0:
                folder.mkdir()
                os.sync()
            together.wait()
            begun = time.perf_counter()
            way(folder, rank, mine, data)
            together.wait()
            if repeat:
                taken[way.__name__].append(time.perf_counter() - begun)
    if rank == 0:
        print(f"{NBYTES / 1e9:g} GB in {len(mine)} arrays, {RANKS} ranks, {REPEATS} repeats, ms: median (min..max)")
        for name, times in taken.items():
            print(f"{name:>5} {median(times) * 1e3:.0f} ({min(times) * 1e3:.0f}..{max(times) * 1e3:.0f})")


def main(folder: str) -> None:
    """Measures below the folder, and removes what was made there."""
    top = Path(folder) / f"bare-{uuid4().hex}"
    top.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    together = context.Barrier(RANKS)
    try:
        processes = [context.Process(target=take_turns, args=(top, rank, together)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(1)
    finally:
        shutil.rmtree(top)


if __name__ == "__main__":
    main(sys.argv[1])
