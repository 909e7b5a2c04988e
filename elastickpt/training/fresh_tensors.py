"""Tensors that an object does not have yet, in a process whose parameters are DTensors: where they are to lie.

A fresh optimizer behind an object takes what its `load_state_dict` gets. A whole plain tensor on every rank would be taken too,
and the next step would fail inside torch: so it gets a DTensor, as it was saved, or as the one parameter of its shape lies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from elastickpt.format.arrays import ArrayId, ArraySpec
from elastickpt.training.binder import Binder
from elastickpt.training.dtensors import Placed, placed, spell_placements
from elastickpt.training.elements import torch_dtype
from elastickpt.training.meshes import mesh_of

_STATE_OF_OPTIMIZER = re.compile(r"(^|/)state/[0-9]+/[^/]+$")


class NoPlaceSaid(Exception):
    """Nothing says how such a tensor is to lie; the message is what the checkpoint has."""


def placed_anew(binder: Binder, id_: ArrayId) -> torch.Tensor | None:
    """An uninitialised DTensor for an array of which this process has none; None where a plain tensor is right.

    Raises NoPlaceSaid where nothing says how it is to lie.
    """
    if binder.listing.is_own(id_):
        return None
    spec = binder.listing.arrays[id_]
    lying = list(_lying(binder))
    alike = {(parts.device_mesh, parts.placements): tensor for tensor, parts in lying if parts.shape == spec.shape}
    saved = binder.listing.layouts.get(id_)
    plain = saved is None and (binder.listing.same_layout or not alike or not _STATE_OF_OPTIMIZER.search(id_.name))
    if not lying or plain:
        return None
    if saved is not None and (found := _as_saved(binder, spec, lying, id_)) is not None:
        return found
    if len(alike) == 1:
        return torch.empty_like(next(iter(alike.values())), dtype=torch_dtype(spec.dtype), requires_grad=False)
    raise NoPlaceSaid("an array whose ranks lay otherwise" if saved is not None else "an array that was whole")


def _lying(binder: Binder) -> Iterator[tuple[torch.Tensor, Placed]]:
    for known in binder.identities:
        if known.role != "buffer" and hasattr(known.tensor, "device_mesh") and (parts := placed(known.tensor)) is not None:
            yield known.tensor, parts


def _as_saved(binder: Binder, spec: ArraySpec, lying: list[tuple[torch.Tensor, Placed]], id_: ArrayId) -> torch.Tensor | None:
    """A DTensor on the same mesh with the same placements; a replica on whatever mesh for what was one."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, empty  # loaded already: parameters are DTensors

    mesh, placements = binder.listing.layouts[id_]
    dtype = torch_dtype(spec.dtype)
    world_size, whole = binder.job.world_size, all(placement == "R" for placement in placements)
    for tensor, parts in lying:
        if mesh_of(parts.device_mesh, world_size=world_size) != mesh:
            continue
        if parts.shape == spec.shape and spell_placements(parts.placements, mesh.sizes, where=id_) == placements:
            return torch.empty_like(tensor, dtype=dtype, requires_grad=False)
    for tensor, parts in lying:
        same = mesh_of(parts.device_mesh, world_size=world_size) == mesh
        if whole:
            local = torch.empty(spec.shape, dtype=dtype, device=tensor.device)
            return DTensor.from_local(local, parts.device_mesh, [Replicate()] * parts.device_mesh.ndim, run_check=False)
        if same and not any(placement.startswith("_") for placement in placements):
            how = [Replicate() if placement == "R" else Shard(int(placement[2:-1])) for placement in placements]
            return empty(spec.shape, dtype=dtype, device_mesh=parts.device_mesh, placements=how)
    return None
