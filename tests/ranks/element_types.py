"""Tensors of every element type, cut unevenly over real ranks: by rows at `fsdp3`, by columns at `tp2`, whole at `single`.

Their bits are a function of their names, so each rank makes the part that it must hold by itself.
"""

from __future__ import annotations

import zlib
from math import prod

import torch
from layouts import hand_sharded
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {
    "uneven": (7, 5),  # 3, 3, 1 rows; 3, 2 columns
    "few": (2, 1),  # one rank of three has no row, one of two no column
    "cube": (4, 3, 5),
    "none": (0, 3),
    "empty rows": (5, 0),
    "scalar": (),
}
CUT = {"fsdp3": (3, 0), "tp2": (2, 1)}  # ranks, dimension


def bits(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The whole tensor of this name: any bits, NaNs of every payload among them; 0 and 1 for bool."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    high = 2 if dtype is torch.bool else 256
    nbytes = prod(shape) * dtype.itemsize
    return torch.randint(0, high, (nbytes,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def _live(layout: str, shape: tuple[int, ...], dtype: torch.dtype, mesh: DeviceMesh | None) -> torch.Tensor:
    """A tensor of zeros as this layout holds it."""
    whole = torch.zeros(shape, dtype=dtype)
    if mesh is None or not shape:
        return whole
    ranks, dim = CUT[layout]
    start = min(-(-shape[dim] // ranks) * mesh.get_local_rank(), shape[dim])
    rows = min(-(-shape[dim] // ranks), shape[dim] - start)
    local = whole.narrow(dim, start, rows).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride())


def _state(layout: str) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """All tensors, the first half of the shapes as buffers of a module, the others in a dict; and by name."""
    mesh = init_device_mesh("cpu", (CUT[layout][0],)) if layout in CUT else None
    model, values, named = nn.Module(), {}, {}
    for dtype in DTYPES:
        for number, (label, shape) in enumerate(SHAPES.items()):
            name = f"{dtype}/{label}".removeprefix("torch.")
            named[name] = _live(layout, shape, dtype, mesh)
            if number % 2:
                values[name] = named[name]
            else:
                model.register_buffer(name, named[name])
    return {"model": model, "values": values}, named


def _part(name: str, live: torch.Tensor) -> tuple[bytes, torch.Tensor]:
    """What this rank must hold of a tensor, as bytes, and where it holds it."""
    whole = bits(name, tuple(live.shape), live.dtype)
    local = live.to_local() if isinstance(live, DTensor) else live
    return _bytes(hand_sharded(whole, live)), local


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save_types(rank: int, world_size: int, layout: str, path: str) -> int:
    import elastickpt as ek

    state, named = _state(layout)
    for name, live in named.items():
        part, local = _part(name, live)
        local.copy_(torch.frombuffer(bytearray(part), dtype=live.dtype).reshape(local.shape) if part else local)
        assert _bytes(local) == part, name
    return ek.save(state, path).nbytes


def load_types(rank: int, world_size: int, layout: str, path: str) -> list[str]:
    """What differs from the parts that this rank cut by hand; nothing should."""
    import elastickpt as ek

    state, named = _state(layout)
    ek.load(state, path)
    found = {name: _part(name, live) for name, live in named.items()}
    return [name for name, (part, local) in found.items() if _bytes(local) != part]
