"""States of an optimizer that do not exist yet, made beside their parameter: on its device, its mesh, its placements."""

from __future__ import annotations

import torch

from elastickpt.format.arrays import ArrayId
from elastickpt.format.values import ArrayReference
from elastickpt.training.anew import composite_anew, not_made, peers, shape_and_dtype
from elastickpt.training.binder import Binder
from elastickpt.training.composites import Path, Saved, cuts_of, is_composite, made
from elastickpt.training.contexts import NotMade
from elastickpt.training.dtensors import Placed, hold, hold_for_loading, place_of_part, placed, placed_as
from elastickpt.training.held_states import hold_state
from elastickpt.training.members import Lying, Member
from elastickpt.training.own import own_holders
from elastickpt.training.strides import empty_in_order


def local_of(entry: torch.Tensor) -> torch.Tensor:
    """This rank's part of a state."""
    parts = placed(entry)
    return entry if parts is None else parts.local


def fill_own(binder: Binder, found: ArrayReference, live: torch.Tensor, *, where: str) -> None:
    """Has a tensor of this rank filled with its own array."""
    wanted = ArrayId("extra", found.item, found.name, "")
    for held in hold(wanted, live, role="other", job=binder.job, holders=own_holders(binder.job)):
        binder.fill(held)


def like_parameter(binder: Binder, member: Member, id_: ArrayId) -> torch.Tensor:
    """An uninitialised plain state for an array, beside a parameter; its axes lie as they lay. [UCF-107]"""
    parameter, parts = member.parameter, placed(member.parameter)
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


def composite_state(binder: Binder, member: Member, id_: ArrayId, saved: Saved) -> torch.Tensor | None:
    """A composite state, to be filled: whole, or of this rank's rows as its class cuts them. None, and a mismatch, where it
    cannot be made."""
    parameter, lying = member.parameter, member.lying
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
    held = hold_state(id_, found, member=member, job=binder.job)
    for one in held or hold_for_loading(id_, found, job=binder.job) or ():
        binder.fill(one)
    return found


def _shard_of(binder: Binder, saved: Saved, parts: Placed, lying: Lying) -> torch.Tensor:
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
