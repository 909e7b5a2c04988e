"""What `copy_threads` brings: `python -m tools.bench.copies [GB]`, by default 1.

One process stages a state into its arena, as a save beside training does, with one, two and four threads in turn, and copies as
many bytes by one memcpy.
"""

from __future__ import annotations

import ctypes
import sys
import time
from statistics import median

import numpy as np
import torch

from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.layout.grid import chunk_shape
from elastickpt.ranks.threads import Pool
from elastickpt.saving.merge import SharedArray
from elastickpt.saving.plan import plan_writes
from elastickpt.saving.staging import Stager
from elastickpt.training.held import HeldArray
from elastickpt.writer.arena import Arena
from elastickpt.writer.arena_plan import prepare

from .state import shapes_for

THREADS, REPEATS = (1, 2, 4), 9


def held_arrays(nbytes: int) -> list[HeldArray]:
    """Parameters of a model of that size, without gaps."""
    found = []
    for name, shape in shapes_for(nbytes).items():
        spec = ArraySpec(ArrayId("params", "model", name, "value"), tuple(shape), "float32")
        found.append(HeldArray(spec, Box.whole(spec.shape), torch.rand(spec.shape), "parameter", "declared", replicas=(0,)))
    return found


def main() -> None:
    held = held_arrays(int(float(sys.argv[1] if len(sys.argv) > 1 else 1) * 1e9))
    shared = [
        SharedArray(str(n), chunk_shape(one.spec.shape, itemsize=4, cuts=()), (0,), True, (), 0, False)
        for n, one in enumerate(held)
    ]
    prepared = prepare(plan_writes(held, shared, rank=0), ())
    arena = Arena.create(prepared.arena_nbytes)
    stager, copiers = Stager(prepared), {threads: Pool("elastickpt-stage", threads) for threads in THREADS}
    whole = np.ones(arena.nbytes, dtype=np.uint8)
    seconds: dict[str, list[float]] = {}
    for _ in range(REPEATS + 1):
        for threads, others in copiers.items():
            arena.empty()
            begun = time.perf_counter()
            stager.stage(arena, 0, held, (), others)
            seconds.setdefault(f"{threads} threads", []).append(time.perf_counter() - begun)
        begun = time.perf_counter()
        ctypes.memmove(arena.memory.ctypes.data, whole.ctypes.data, arena.nbytes)
        seconds.setdefault("one memcpy", []).append(time.perf_counter() - begun)
    for name, found in seconds.items():
        rest = found[1:]
        print(f"{name:11} {arena.nbytes / 1e9 / median(rest):6.2f} GB/s   {min(rest):.3f} to {max(rest):.3f} s")


if __name__ == "__main__":
    main()
