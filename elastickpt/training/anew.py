"""Tensors that do not exist yet, made for arrays of a checkpoint and to be filled from them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from elastickpt.format.arrays import ArrayId, Box
from elastickpt.format.values import ArrayReference
from elastickpt.training.binder import Binder
from elastickpt.training.composites import SPARSE, Saved, made, require_indices
from elastickpt.training.contexts import NotMade
from elastickpt.training.dtensors import placed
from elastickpt.training.elements import elements_of, torch_dtype
from elastickpt.training.held import HeldArray
from elastickpt.training.memory import numpy_over
from elastickpt.training.strides import Order, empty_in_order

RUN_ONE_STEP = "run one step before loading"


def shape_and_dtype(binder: Binder, id_: ArrayId) -> tuple[tuple[int, ...], torch.dtype, Order]:
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
