"""Tensors that do not exist yet, made for arrays of a checkpoint and to be filled from them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from elastickpt.format.arrays import ArrayId
from elastickpt.format.box import Box
from elastickpt.format.values import ArrayReference
from elastickpt.training.composites import SPARSE, Saved, made, require_indices
from elastickpt.training.contexts import NotMade
from elastickpt.training.draft import Draft
from elastickpt.training.dtensors import placed
from elastickpt.training.elements import elements_of, torch_dtype
from elastickpt.training.held import HeldArray
from elastickpt.training.memory import numpy_over
from elastickpt.training.strides import Order, empty_in_order

RUN_ONE_STEP = "run one step before loading"


def shape_and_dtype(draft: Draft, id_: ArrayId) -> tuple[tuple[int, ...], torch.dtype, Order]:
    """What the whole tensor was that an array holds, and how its axes lay in memory. [UCF-23, UCF-107]"""
    spec, stored_as = draft.listing.arrays[id_], draft.listing.attributes.get(id_, {}).get("stored_as")
    dtype, shape = torch_dtype(spec.dtype), spec.shape
    if isinstance(stored_as, str):
        dtype = torch_dtype(stored_as)
        shape = shape if dtype.itemsize == 1 else shape[:-1]
    order = draft.listing.order(id_)
    return shape, dtype, order if len(order) == len(shape) else ()


def tensor_anew(draft: Draft, id_: ArrayId, *, device: torch.device | str) -> torch.Tensor:
    """A whole plain tensor, to be filled by this rank."""
    shape, dtype, order = shape_and_dtype(draft, id_)
    found = empty_in_order(shape, order, dtype=dtype, device=device)
    spec, elements = draft.listing.arrays[id_], elements_of(found, where=id_)
    draft.arrays.add(id_)
    draft.targets.append(
        HeldArray(spec, Box.whole(spec.shape), elements.tensor, "other", "declared", replicas=(draft.job.rank,))
    )
    return found


def composite_anew(draft: Draft, id_: ArrayId, saved: Saved, *, device: torch.device | str) -> torch.Tensor | None:
    """A whole composite tensor, to be filled by this rank; None, and a mismatch, where its class cannot be made here."""
    parts = {path: tensor_anew(draft, part, device=device) for path, part in saved.parts.items()}
    if saved.composition["class"] == SPARSE:
        draft.installs.append(lambda: require_indices(parts["indices",], saved.shape))
    try:
        return made(saved.composition, parts, shape=saved.shape, peers=peers(draft))
    except NotMade as reason:
        not_made(draft, id_, saved, reason)
        return None


def not_made(draft: Draft, id_: ArrayId, saved: Saved, reason: NotMade) -> None:
    """Records that a composite tensor of the checkpoint cannot be made in this process."""
    for part in saved.parts.values():
        draft.arrays.add(part)
    expected = f"a composite tensor of its class to be there already: {reason}; {RUN_ONE_STEP}"
    draft.differs(str(id_), "value", expected=expected, found=saved.text)


def peers(draft: Draft) -> Iterator[torch.Tensor]:
    """The tensors that this process has."""
    for known in draft.identities:
        parts = placed(known.tensor)
        yield known.tensor if parts is None else parts.local


def referred_anew(draft: Draft, found: ArrayReference, *, device: torch.device | str = "cpu") -> object:
    """What a reference stands for; None, and a mismatch, where the checkpoint lacks it or it cannot be made."""
    wanted = ArrayId("extra", found.item, found.name, "")
    if (saved := draft.listing.composites.get(wanted)) is not None:
        return composite_anew(draft, wanted, saved, device=device)
    id_ = draft.names.array(wanted)
    if id_ is None:
        draft.missing(str(wanted), "an array")
        return None
    draft.know(wanted)
    if found.origin == "numpy":
        return numpy_over(tensor_anew(draft, id_, device="cpu"))[()]
    return tensor_anew(draft, id_, device=device)
