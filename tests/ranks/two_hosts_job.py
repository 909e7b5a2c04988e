"""One rank of a job on two hosts, as far as a host can be played by a network namespace with a name of its own: `RANK FOLDER`.

Ends with 0 if all of it was as it should be. The file system is taken for one where several hosts may fill a file together.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import elastickpt as ek
from elastickpt.errors import PlacementUnsupported
from elastickpt.ranks.addresses import own_address
from elastickpt.storage import local

PORT = 29777
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LIMIT_S = 60.0


def main(rank: int, folder: Path) -> None:
    store = dist.TCPStore(ADDRESSES[0], PORT, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=LIMIT_S))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(ADDRESSES))
    assert own_address() == ADDRESSES[rank]
    mesh = init_device_mesh("cpu", (len(ADDRESSES),))

    def state(value: int) -> dict[str, object]:
        own = torch.full((500, 64), float(value))
        return {"w": {f"t{k}": DTensor.from_local(own + k, mesh, [Shard(0)]) for k in range(20)}, "n": value}

    kind = local.file_system(str(folder))
    if kind not in local._SHARED_BY_HOSTS:
        with pytest.raises(PlacementUnsupported, match="ranks on 2 hosts"):
            ek.save(state(1), folder / "refused", placement="plain")
    ek.save(state(3), folder / "packed", placement="packed")
    loaded = state(0)
    ek.load(loaded, folder / "packed")
    assert loaded["n"] == 3
    local._SHARED_BY_HOSTS |= {kind}  # type: ignore[misc]
    ek.save(state(1), folder / "plain")
    loaded = state(0)
    ek.load(loaded, folder / "plain")
    assert loaded["n"] == 1
    for handle in [ek.async_save(state(5 + k), folder / f"beside-{k}") for k in range(2)]:
        assert handle.result(LIMIT_S).arrays == 20
    with_run(state(0), folder / "run", step=0)
    with_run(state(0), folder / "run", step=4)
    dist.destroy_process_group()


def with_run(state: dict[str, object], path: Path, *, step: int) -> None:
    """Restores `step` with all values, and saves the next four."""
    run = ek.Run(path, state)
    assert run.restore().step == step
    tensors = list(state["w"].values())  # type: ignore[attr-defined]
    if step:
        assert state["n"] == step
        assert all(float(tensor.to_local().mean()) == step for tensor in tensors)
    for following in range(step + 1, step + 5):
        for tensor in tensors:
            tensor.to_local().fill_(following)
        state["n"] = following
        run.save(following)
    run.close()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = f"ek{sys.argv[1]}"
    main(int(sys.argv[1]), Path(sys.argv[2]))
