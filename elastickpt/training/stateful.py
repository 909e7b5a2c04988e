"""Trees of values and tensors: state dicts of objects. Containers that stand in `state` themselves: `containers`.

Saving: tensors become arrays of section `extra`, an ArrayReference stands in their place, all else is carried whole.

Loading an *object*: the tree comes from the checkpoint, whatever the object's own looks like now. A tensor is read
into the one that its state dict has at that place, when shape, element type and sharding allow it, else into a new one.
The object gets the tree through `load_state_dict`, in `install()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeGuard

import torch

from elastickpt.errors import ValueNotCarried
from elastickpt.format.arrays import ArrayId
from elastickpt.format.encode_values import typed_key
from elastickpt.format.values import ArrayReference, ArrayValue, Value
from elastickpt.training.anew import NoPlaceSaid, placed_anew, referred_anew, shape_and_dtype
from elastickpt.training.binder import Binder
from elastickpt.training.composites import composition_of, is_composite, is_sparse
from elastickpt.training.dtensors import Job, placed
from elastickpt.training.elements import order_of
from elastickpt.training.held import HeldArray
from elastickpt.training.modules import hold_tensor
from elastickpt.training.own import as_tensor, is_large
from elastickpt.training.parameters import Identities
from elastickpt.training.trees import (
    children,
    mapped,
    named_tuple_of,
    place_of,
)
from elastickpt.training.values import carried_leaf, revived_leaf, tensor_of


class Stateful(Protocol):
    """What schedulers, loaders, scalers and the like offer."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def is_stateful(value: object) -> TypeGuard[Stateful]:
    """Whether an entry of `state` is an object that gives and takes its state."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def hold_tree(item: str, value: object, *, place: str, job: Job, identities: Identities) -> tuple[Value, tuple[HeldArray, ...]]:
    """The tree of `value`, which stands at `place` below `item`, and its tensors.

    Raises ValueNotCarried with the places of all that no checkpoint can hold.
    """
    arrays: list[HeldArray] = []
    refused: list[ValueNotCarried] = []
    above = len(place_of(item)) + 1

    def leaf(one: object, where: str) -> Value:
        if not isinstance(one, torch.Tensor) and not is_large(one):
            try:
                return carried_leaf(one, where)
            except ValueNotCarried as error:
                refused.append(error)
                return None
        name = where[above:]
        arrays.extend(hold_tensor(item, name, as_tensor(one), job=job, identities=identities))
        return ArrayReference(item, name, "torch" if isinstance(one, torch.Tensor) else "numpy")

    tree = mapped(value, place, leaf)
    if refused:
        others = [error.message.partition(";")[0] for error in refused[1:MAX_NAMED]]
        more = f"; and {len(refused) - MAX_NAMED} more" if len(refused) > MAX_NAMED else ""
        raise ValueNotCarried("; also ".join((refused[0].message, *others)) + more)
    return tree, tuple(arrays)


MAX_NAMED = 20  # of the values that one error names


def bind_tree(
    binder: Binder,
    item: str,
    found: Value,
    *,
    place: str,
    live: object,
    instead: Mapping[str, object] | None = None,
    device: torch.device | str = "cpu",
) -> object:
    """The tree to give to an object whose own is `live`: the checkpoint's `found`, its tensors still to be filled.

    `instead` maps places at which the checkpoint has None to what shall stand there. New tensors are made on `device`.
    """
    own = dict(tensors_at(live, place))
    instead = instead or {}

    def leaf(one: object, where: str) -> object:
        if one is None and where in instead:
            return instead[where]
        if type(one) is ArrayReference:
            return _bind_reference(binder, item, one, own.get(where), device)
        return revived_leaf(one, device)

    return mapped(found, place, leaf, named_tuple_of)


def tensors_at(value: object, place: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a tree that stands at `place`, each with its own place."""
    if isinstance(value, torch.Tensor):
        yield place, value
    for name, one in children(value):
        yield from tensors_at(one, f"{place}/{name}")


def _bind_reference(
    binder: Binder, item: str, found: ArrayReference, live: torch.Tensor | None, device: torch.device | str
) -> object:
    wanted = ArrayId("extra", found.item, found.name, "")
    if live is None and found.origin == "torch" and (id_ := binder.names.array(wanted)) is not None:
        return _made_anew(binder, item, found, id_, device)
    if live is None or found.origin != "torch":
        return referred_anew(binder, found, device=device)
    if not _fits(binder, wanted, live):
        return referred_anew(binder, found, device=live.device)
    for held in hold_tensor(item, found.name, live, job=binder.job, identities=binder.identities):
        binder.fill(held)
    if binder.names.array(wanted) is not None:
        binder.know(wanted)
    return live


def _made_anew(binder: Binder, item: str, found: ArrayReference, id_: ArrayId, device: torch.device | str) -> object:
    """A tensor that the object does not have yet: a DTensor where the parameters of this process are such; else plain."""
    try:
        made = placed_anew(binder, id_)
    except NoPlaceSaid as reason:
        binder.know(id_)
        binder.differs(str(id_), "value", expected=RUN_ONE_STEP, found=str(reason))
        return None
    if made is None:
        return referred_anew(binder, found, device=device)
    for held in hold_tensor(item, found.name, made, job=binder.job, identities=binder.identities):
        binder.fill(held)
    binder.know(id_)
    return made


RUN_ONE_STEP = "a tensor there, to lie as that does: put the optimizer itself into `state`, or make its states before"


def _fits(binder: Binder, wanted: ArrayId, live: torch.Tensor) -> bool:
    """A DTensor has to fit, since what replaces it would have to be placed; another tensor can be replaced."""
    id_ = binder.names.array(wanted)
    if placed(live) is not None:
        return True
    if (saved := binder.listing.composites.get(wanted)) is not None:
        alike = is_composite(live) and not is_sparse(live)
        return alike and typed_key(composition_of(live, where=wanted)) == typed_key(saved.composition)
    if id_ is None:
        return not is_composite(live)
    shape, dtype, order = shape_and_dtype(binder, id_)
    return (tuple(live.shape), live.dtype) == (shape, dtype) and not is_composite(live) and order in ((), order_of(live))


def bind_object(binder: Binder, item: str, live: Stateful, *, place: str) -> None:
    """Gives the checkpoint's tree at `place`, of `item` or below, to an object."""
    binder.places.add(place)
    if place not in binder.listing.values:
        binder.missing(place, f"the state of a {type(live).__name__}")
        return
    tree = bind_tree(binder, item, binder.listing.values[place], place=place, live=live.state_dict())
    binder.installs.append(lambda: live.load_state_dict(tree))


def copy_into(live: torch.Tensor, value: ArrayValue) -> None:
    """Fills a plain tensor (parameter or not) with a value of its shape and element type."""
    with torch.no_grad():
        live.detach().copy_(tensor_of(value))
