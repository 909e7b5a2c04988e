"""Tensors that do not exist yet, made for arrays of a checkpoint and to be filled from them.

A state of an optimizer is made beside its parameter: on its device, its mesh, its placements. A fresh optimizer behind an
object takes what its `load_state_dict` gets. A whole plain tensor on every rank would be taken too, and the next step would
fail inside torch: so it gets a DTensor, as it was saved, or as the one parameter of its shape lies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.format.values import ArrayReference
from elastickpt.training.binder import Binder
from elastickpt.training.composites import SPARSE, Path, Saved, cuts_of, is_composite, made, require_indices
from elastickpt.training.contexts import NotMade
from elastickpt.training.dtensors import (
    DTensorParts,
    hold,
    hold_for_loading,
    place_of_part,
    placed,
    placed_as,
)
from elastickpt.training.elements import DimOrder, elements_of, empty_in_order, numpy_over, torch_dtype
from elastickpt.training.held import HeldArray
from elastickpt.training.held_trees import own_holders
from elastickpt.training.optimizer_states import hold_state
from elastickpt.training.parallel import mesh_of, spell_placements
from elastickpt.training.parameters import Lying, OwnedParameter

RUN_ONE_STEP = "run one step before loading"


def shape_and_dtype(binder: Binder, id_: ArrayId) -> tuple[tuple[int, ...], torch.dtype, DimOrder]:
    """What the whole tensor was that an array holds, and how its axes lay in memory. [UCF-23, UCF-107]"""
    spec, stored_as = binder.listing.arrays[id_], binder.listing.attributes.get(id_, {}).get("stored_as")
    dtype, shape = torch_dtype(spec.dtype), spec.shape
    if isinstance(stored_as, str):
        dtype = torch_dtype(stored_as)
        shape = shape if dtype.itemsize == 1 else shape[:-1]
    order = binder.listing.order(id_)
    return shape, dtype, order if len(order) == len(shape) else ()


def tensor_anew(binder: Binder, id_: ArrayId, *, device: torch.device | str) -> torch.Tensor:
    """A whole plain tensor, to be filled by this rank."""
    shape, dtype, order = shape_and_dtype(binder, id_)
    found = empty_in_order(shape, order, dtype=dtype, device=device)
    spec, elements = binder.listing.arrays[id_], elements_of(found, where=id_)
    binder.arrays.add(id_)
    binder.targets.append(
        HeldArray(spec, Box.whole(spec.shape), elements.tensor, "other", "declared", replicas=(binder.job.rank,))
    )
    return found


def composite_anew(binder: Binder, id_: ArrayId, saved: Saved, *, device: torch.device | str) -> torch.Tensor | None:
    """A whole composite tensor, to be filled by this rank; None, and a mismatch, where its class cannot be made here."""
    parts = {path: tensor_anew(binder, part, device=device) for path, part in saved.parts.items()}
    if saved.composition["class"] == SPARSE:
        binder.installs.append(lambda: require_indices(parts["indices",], saved.shape))
    try:
        return made(saved.composition, parts, shape=saved.shape, peers=peers(binder))
    except NotMade as reason:
        not_made(binder, id_, saved, reason)
        return None


def not_made(binder: Binder, id_: ArrayId, saved: Saved, reason: NotMade) -> None:
    """Records that a composite tensor of the checkpoint cannot be made in this process."""
    for part in saved.parts.values():
        binder.arrays.add(part)
    expected = f"a composite tensor of its class to be there already: {reason}; {RUN_ONE_STEP}"
    binder.differs(str(id_), "value", expected=expected, found=saved.text)


def peers(binder: Binder) -> Iterator[torch.Tensor]:
    """The tensors that this process has."""
    for known in binder.identities:
        parts = placed(known.tensor)
        yield known.tensor if parts is None else parts.local


def referred_anew(binder: Binder, found: ArrayReference, *, device: torch.device | str = "cpu") -> object:
    """What a reference stands for; None, and a mismatch, where the checkpoint lacks it or it cannot be made."""
    wanted = ArrayId("extra", found.item, found.name, "")
    if (saved := binder.listing.composites.get(wanted)) is not None:
        return composite_anew(binder, wanted, saved, device=device)
    id_ = binder.names.array(wanted)
    if id_ is None:
        binder.missing(str(wanted), "an array")
        return None
    binder.know(wanted)
    if found.origin == "numpy":
        return numpy_over(tensor_anew(binder, id_, device="cpu"))[()]
    return tensor_anew(binder, id_, device=device)


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


def _lying(binder: Binder) -> Iterator[tuple[torch.Tensor, DTensorParts]]:
    for known in binder.identities:
        if known.role != "buffer" and hasattr(known.tensor, "device_mesh") and (parts := placed(known.tensor)) is not None:
            yield known.tensor, parts


def _as_saved(
    binder: Binder, spec: ArraySpec, lying: list[tuple[torch.Tensor, DTensorParts]], id_: ArrayId
) -> torch.Tensor | None:
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


def local_of(entry: torch.Tensor) -> torch.Tensor:
    """This rank's part of a state."""
    parts = placed(entry)
    return entry if parts is None else parts.local


def fill_own(binder: Binder, found: ArrayReference, live: torch.Tensor, *, where: str) -> None:
    """Has a tensor of this rank filled with its own array."""
    wanted = ArrayId("extra", found.item, found.name, "")
    for held in hold(wanted, live, role="other", job=binder.job, holders=own_holders(binder.job)):
        binder.fill(held)


def like_parameter(binder: Binder, param: OwnedParameter, id_: ArrayId) -> torch.Tensor:
    """An uninitialised plain state for an array, beside a parameter; its axes lie as they lay. [UCF-107]"""
    parameter, parts = param.parameter, placed(param.parameter)
    shape, dtype, order = shape_and_dtype(binder, id_)
    device = parameter.device if parts is None else parts.local.device
    if tuple(parameter.shape) != shape:
        return replicated_as(parameter, empty_in_order(shape, order, dtype=dtype, device=device))
    local = parameter if parts is None else parts.local
    value = ArrayId("params", id_.item, id_.name, "value")
    if order == binder.listing.order(value) and not is_composite(local):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    found = empty_in_order(local.shape, order, dtype=dtype, device=device)
    return found if parts is None or not hasattr(parameter, "device_mesh") else placed_as(parts, found)


def replicated_as(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`whole` as a replica on the mesh of its parameter, which only other DTensors may be combined with; or as it
    is.
    """
    parts = placed(parameter)
    if parts is None or not hasattr(parameter, "device_mesh"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate  # loaded already: the parameter is a DTensor

    return DTensor.from_local(whole, parts.device_mesh, [Replicate() for _ in parts.placements], run_check=False)


def composite_state(binder: Binder, param: OwnedParameter, id_: ArrayId, saved: Saved) -> torch.Tensor | None:
    """A composite state, to be filled: whole, or of this rank's rows as its class cuts them. None, and a mismatch, where it
    cannot be made."""
    parameter, lying = param.parameter, param.lying
    parts = placed(parameter)
    if parts is None or lying is None:
        return composite_anew(binder, id_, saved, device=parameter.device)
    if saved.shape != tuple(parts.shape):
        whole = composite_anew(binder, id_, saved, device=parts.local.device)
        return None if whole is None else replicated_as(parameter, whole)
    try:
        found = placed_as(parts, _shard_of(binder, saved, parts, lying))
    except NotMade as reason:
        not_made(binder, id_, saved, reason)
        return None
    held = hold_state(id_, found, param=param, job=binder.job)
    for one in held or hold_for_loading(id_, found, job=binder.job) or ():
        binder.fill(one)
    return found


def _shard_of(binder: Binder, saved: Saved, parts: DTensorParts, lying: Lying) -> torch.Tensor:
    """This rank's rows of a composite tensor, not filled yet. Raises NotMade."""
    facts = {path: shape_and_dtype(binder, part) for path, part in saved.parts.items()}
    shapes: dict[Path, tuple[int, ...]] = {
        path: lying.box.shape if shape == saved.shape else shape for path, (shape, _, _) in facts.items()
    }
    if lying.sharded and any(shape != saved.shape for shape, _, _ in facts.values()):
        meta = {path: torch.empty(shape, dtype=dtype, device="meta") for path, (shape, dtype, _) in facts.items()}
        cuts = cuts_of(made(saved.composition, meta, shape=saved.shape, peers=peers(binder)))
        if cuts is None:
            raise NotMade("its class does not say how its parts are cut")
        for path, (shape, _, _) in facts.items():
            shapes[path] = place_of_part(shape, cuts.by_path[path], saved.shape, lying.box)[1].shape
    own = {
        path: empty_in_order(shapes[path], order, dtype=dtype, device=parts.local.device)
        for path, (_, dtype, order) in facts.items()
    }
    return made(saved.composition, own, shape=lying.box.shape, peers=peers(binder))
