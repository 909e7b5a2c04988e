"""One state of a parameter as held arrays: where it lies beside its parameter."""

from __future__ import annotations

from dataclasses import replace
from math import inf, prod

import torch
from torch.optim import Optimizer

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.training.composites import is_composite
from elastickpt.training.dtensors import DTensorParts, JobView, has_place, hold, is_even, memorable, parts_of_spec, placed
from elastickpt.training.elements import elements_of, settled
from elastickpt.training.held import HeldArray, Seen
from elastickpt.training.parameters import Lying, OwnedParameter


def local_scalar(tensor: torch.Tensor) -> torch.Tensor:
    """The plain 0-d tensor of a 0-d state; raises LayoutUnsupported for one that is still to be reduced."""
    parts = placed(settled(tensor))
    if parts is None:
        return tensor
    if not all(placement.is_replicate() for placement in parts.placements):
        raise LayoutUnsupported(f"a 0-d optimizer state placed as {parts.placements}, expected it to be replicated")
    return parts.local


def hold_state(id_: ArrayId, tensor: torch.Tensor, *, param: OwnedParameter, job: JobView) -> tuple[HeldArray, ...] | None:
    """What this rank holds of a state; None when it is this rank's own, with no place in the whole.

    A DTensor has its own shape and place. A plain tensor has its parameter's, if it has the shape of the local shard;
    on a parameter that is not sharded it is whole, whatever its shape.
    """
    lying = param.lying
    if lying is None:
        return ()
    memo, plain = job.memo, None if job.memo is None else memorable(tensor)
    if memo is None or plain is None:
        return _hold_state(id_, tensor, param=param, job=job, lying=lying)
    local, spec = plain
    cause = (lying.held.spec, spec, *parts_of_spec(spec))  # the parameter's spec is an object of its own: it says how that lies
    if (again := memo.find(tensor, local, id_, "parameter", cause)) is not None:
        return (again,)
    found = _hold_state(id_, tensor, param=param, job=job, lying=lying)
    if found is not None and len(found) == 1:
        memo.put(tensor, Seen.of(found[0], local, role="parameter", cause=cause))
    return found


def _hold_state(
    id_: ArrayId, tensor: torch.Tensor, *, param: OwnedParameter, job: JobView, lying: Lying
) -> tuple[HeldArray, ...] | None:
    tensor = settled(tensor)
    parts = placed(tensor)
    local = tensor if parts is None else parts.local
    if is_composite(local) or (parts is not None and not _same_place(parts, lying.own)):
        if (parts is None and lying.sharded) or not has_place(tensor, job=job):
            return None
        return hold(id_, tensor, role="parameter", job=job, holders=param.known.holders)
    if tuple(local.shape) == lying.box.shape or lying.box.count == 0 == local.numel():
        return (_beside(id_, local, lying.held, box=lying.box, shape=lying.shape),)
    if lying.sharded:
        return None
    whole = tuple(local.shape)
    held = _beside(id_, local, lying.held, box=Box.whole(whole), shape=whole)
    return (replace(held, placements=("R",) * len(held.placements)),)


def _same_place(one: DTensorParts, other: DTensorParts | None) -> bool:
    return (
        other is not None
        and one.shape == other.shape
        and one.placements == other.placements
        and one.device_mesh == other.device_mesh
    )


def _beside(id_: ArrayId, tensor: torch.Tensor, held: HeldArray, *, box: Box, shape: tuple[int, ...]) -> HeldArray:
    """A plain local tensor that lies in `box` and is shared as its parameter is."""
    if tuple(tensor.shape) != box.shape:  # an empty shard, whose other axes torch leaves at any extent
        tensor = tensor.new_empty(box.shape)
    elements = elements_of(tensor, where=id_)
    if tail := elements.tail:
        shape, box = (*shape, *tail), Box((*box.start, *(0 for _ in tail)), (*box.stop, *tail))
    return HeldArray(
        ArraySpec(id_, shape, elements.dtype),
        box,
        elements.tensor,
        "parameter",
        held.sharing,
        mesh=held.mesh,
        placements=held.placements,
        replicas=held.replicas,
        attributes=elements.attributes,
        order=elements.order,
    )


FEW_ELEMENTS = 1024  # below this many nobody quantises a shard


def fewest_quantised(optimizer: Optimizer) -> float:
    """From how many elements on a shard's state may be a composite tensor on one rank and a plain one on another; infinite for
    an optimizer beside which no class of composite tensors is defined, which says the same on all ranks."""
    beside = type(optimizer).__module__.rpartition(".")[0] or type(optimizer).__module__
    kinds, seen = [torch.Tensor], set[type]()
    while kinds:
        kind = kinds.pop()
        if kind in seen:
            continue
        seen.add(kind)
        kinds += kind.__subclasses__()
        if hasattr(kind, "__tensor_flatten__") and (kind.__module__.rpartition(".")[0] or kind.__module__) == beside:
            return FEW_ELEMENTS
    return inf


def most_elements(parts: DTensorParts) -> float:
    """The elements of the largest shard of a DTensor of which ranks hold unevenly many rows; -1 for another one."""
    ways = prod(
        size for size, placement in zip(parts.device_mesh.shape, parts.placements, strict=True) if not placement.is_replicate()
    )
    return -1 if ways == 1 or is_even(parts) else -(-parts.shape[0] // ways) * prod(parts.shape[1:])
