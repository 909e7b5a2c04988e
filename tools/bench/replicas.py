"""What comparing replicas costs: `python -m tools.bench.replicas FOLDER [MB]`, by default 100.

Two ranks hold one state of that size alike, in plain tensors, and save it into the folder in turn: declared to be replicas
(`mesh=`), which compares nothing; not declared, which compares in every save; and declared, but to be verified.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.distributed import barrier
from torch.distributed.device_mesh import init_device_mesh

import elastickpt as ek
from elastickpt.saving.drift import host_digest
from tools.gloo_ranks import run_ranks

from .state import shapes_for

REPEATS, LIMIT_S = 9, 600.0
Seconds = dict[str, list[float]]


def _model(nbytes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.ParameterDict({name.replace(".", "_"): torch.rand(shape) for name, shape in shapes_for(nbytes).items()})


def _ways(rank: int, world_size: int, folder: str, nbytes: int) -> Seconds:
    mesh = init_device_mesh("cpu", (world_size,))
    state, seconds = {"model": _model(nbytes)}, Seconds()
    ways = {"declared": {"mesh": mesh}, "inferred": {}, "verified": {"mesh": mesh, "replicas": "verify"}}

    def took(name: str, begun: float) -> None:
        seconds.setdefault(name, []).append(time.perf_counter() - begun)

    for number in range(REPEATS + 1):
        for name, options in ways.items():
            barrier()
            begun = time.perf_counter()
            handle = ek.async_save(state, f"{folder}/{name}-beside-{number}", **options)  # type: ignore[arg-type]
            took(f"stall      {name}", begun)
            handle.result(LIMIT_S)
            took(f"until done {name}", begun)
            barrier()
            begun = time.perf_counter()
            ek.save(state, f"{folder}/{name}-{number}", **options)  # type: ignore[arg-type]
            took(f"blocking   {name}", begun)
            barrier()
            if rank == 0:
                shutil.rmtree(folder)
                Path(folder).mkdir()
        begun = time.perf_counter()
        for parameter in state["model"].parameters():
            host_digest(parameter.detach(), 0, parameter.numel())
        took("one pass of xxh3", begun)
    return seconds


def main() -> None:
    folder = Path(sys.argv[1]) / "replicas"
    folder.mkdir(parents=True)
    megabytes = float(sys.argv[2]) if len(sys.argv) > 2 else 100.0
    ranks = run_ranks(_ways, 2, str(folder), int(megabytes * 1e6), timeout_s=1800.0)
    for name in ranks[0]:
        found = [max(each) for each in zip(*(seen[name][1:] for seen in ranks), strict=True)]  # of both ranks the slower one
        print(f"{name:20} {1e3 * median(found):8.1f} ms   {1e3 * min(found):.1f} to {1e3 * max(found):.1f}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    from tools.bench import replicas  # its ranks find what they run by the module's name

    replicas.main()
