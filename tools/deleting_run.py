"""Saves of a run that keeps its last few checkpoints, one after the other: whether those that follow deletions become slower.

    python -m tools.deleting_run [--placement packed] [--saves 12] [--keep 2]

Two ranks save 0.1 GB in 333 arrays by `Run.save`, which is waited for until the checkpoint is there; the run then removes what
it does not keep any more. Beside each save stands one file a rank of as many bytes, written past the cache and synced: what
the disk did at that time. Seconds, the slower rank's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import elastickpt as ek
from tools.bench.floors import RawFiles, WarmBuffer
from tools.bench.state import fill, local_nbytes, sharded_state
from tools.gloo_ranks import run_ranks


def saves(
    rank: int, world_size: int, folder: str, placement: Literal["plain", "packed"], count: int, keep: int, nbytes: int
) -> list[tuple[float, float]]:
    """Seconds of each save and of the raw file beside it, the slowest rank's."""
    torch.set_num_threads(1)
    state = sharded_state(nbytes, init_device_mesh("cpu", (world_size,)))
    fill(state)
    raw = RawFiles(WarmBuffer(local_nbytes(state)), "direct")
    run = ek.Run(Path(folder, "run"), state, keep=ek.Keep(last=keep), options=ek.RunOptions(placement=placement))
    run.restore()
    found = []
    for step in range(1, count + 1):
        saved_s = slowest(lambda step=step: run.save(step).result())  # type: ignore[misc]
        raw_s = slowest(lambda: raw.save(state, Path(folder, "raw")))
        found.append((saved_s, raw_s))
    run.close()
    return found


def slowest(work: Callable[[], object]) -> float:
    """Seconds that a piece of work takes the rank that needs longest; all begin together."""
    dist.barrier()
    begun = time.monotonic()
    work()
    taken = torch.tensor(time.monotonic() - begun)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def main() -> None:
    from tools import deleting_run  # the ranks find its function by that name, not by "__main__"

    parser = argparse.ArgumentParser(prog="python -m tools.deleting_run", description=__doc__)
    parser.add_argument("--placement", choices=("plain", "packed"), default="plain")
    parser.add_argument("--saves", type=int, default=12, metavar="N")
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="of which so many stay")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs, each in a new folder")
    parser.add_argument("--gb", type=float, default=0.1)
    parser.add_argument("--where", default="/var/tmp", metavar="FOLDER")
    told = parser.parse_args()
    rows = []
    for _ in range(told.repeats):
        folder = tempfile.mkdtemp(dir=told.where)
        try:
            work = (folder, told.placement, told.saves, told.keep, int(told.gb * 1e9))
            rows.append(run_ranks(deleting_run.saves, 2, *work, timeout_s=600)[0])
        finally:
            shutil.rmtree(folder)
    print(f"{told.placement}, {told.gb:g} GB, {told.keep} kept, {told.repeats} runs, load {os.getloadavg()[0]:.1f}: medians, s")
    print("save" + "".join(f"{step:8}" for step in range(1, told.saves + 1)))
    for name, which in (("", 0), ("raw", 1)):
        medians = (statistics.median(row[step][which] for row in rows) for step in range(told.saves))
        print(f"{name:4}" + "".join(f"{value:8.3f}" for value in medians))


if __name__ == "__main__":
    main()
