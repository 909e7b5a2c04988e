"""Trees of values and tensors taking what a checkpoint has: state dicts of objects, and containers that stand in `state`.

Loading an *object*: the tree comes from the checkpoint, whatever the object's own looks like now. A tensor is read
into the one that its state dict has at that place, when shape, element type and sharding allow it, else into a new one.
The object gets the tree through `load_state_dict`, in `install()`.

Loading a *container of the user* changes it in place, and keeps its structure:
- tensors are read into the tensors that stand there;
- a dict keeps its keys: keys on one side only are mismatches (a tensor's only if no rank has it), but an empty dict takes
  all of a dict without tensors;
- a list or deque takes the checkpoint's length where no tensors are in it, else the lengths must be equal; sets and
  Counters take all;
- numbers, strings and other leaves become the checkpoint's, whatever they were;
- what is immutable (a leaf, a tuple, a named tuple) is replaced in the container around it; at the top, in `state` itself.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import numpy
import torch

from elastickpt.format.arrays import ArrayId
from elastickpt.format.encode_values import typed_key
from elastickpt.format.values import ArrayReference, ArrayValue, NamedTupleValue, Value
from elastickpt.training.anew import NoPlaceSaid, placed_anew, referred_anew, shape_and_dtype
from elastickpt.training.binder import Binder
from elastickpt.training.composites import composition_of, is_composite, is_sparse
from elastickpt.training.dict_binding import bind_dict
from elastickpt.training.dtensors import hold, placed
from elastickpt.training.elements import dtype_name, order_of, shares, tensor_over
from elastickpt.training.held import HeldArray
from elastickpt.training.held_trees import Stateful, own_holders
from elastickpt.training.modules import hold_tensor
from elastickpt.training.trees import (
    children,
    holds_tensors,
    is_named_tuple,
    mapped,
    named_tuple_of,
    place_of,
    token,
    type_name,
)
from elastickpt.training.values import revived_leaf, shown, tensor_of


def bind_container(binder: Binder, item: str, live: object, *, found: Value, put: Callable[[object], None]) -> None:
    """Brings a value of the user to what the checkpoint has; `put` replaces the whole when it is immutable."""
    new = _Container(binder, item).settled(live, found, place_of(item))
    if new is not live:
        binder.installs.append(lambda: put(new))


class _Container:
    """One walk over a container of the user and the checkpoint's tree of it, side by side."""

    def __init__(self, binder: Binder, item: str) -> None:
        self._binder = binder
        self._item = item

    def settled(self, live: object, found: Value, place: str) -> object:
        """What shall stand at `place`: `live` itself where it is changed in place (or refused), or its successor."""
        if isinstance(live, torch.Tensor):
            return self._tensor(live, found, place)
        if (
            isinstance(found, ArrayReference)
            and found.origin == "numpy"
            and not (_opaque(live) or isinstance(live, _CONTAINERS))
        ):
            return self._large_numpy(live, found)
        if type(found) is ArrayReference or _opaque(live):
            return self._differs(live, found, place)
        if isinstance(live, numpy.ndarray) and type(found) is ArrayValue:
            return self._numpy(live, found)
        if is_named_tuple(live):
            return self._named_tuple(live, found, place)
        if (tuple if type(live) is torch.Size else type(live)) is not type(found):
            replaceable = not isinstance(live, _CONTAINERS) and not holds_tensors(found)
            return self._new(found, place) if replaceable else self._differs(live, found, place)
        if isinstance(live, (Counter, set)):
            if holds_tensors(found):
                return self._differs(live, found, place)
            new = self._new(found, place)
            self._later(lambda: _refill(live, new))
            return live
        if isinstance(live, dict):
            return self._dict(live, found, place)
        if isinstance(live, (list, tuple, deque)):
            return self._sequence(live, found, place)
        return self._new(found, place)

    def _new(self, found: Value, place: str) -> object:
        """What the checkpoint has, made anew."""
        return bind_tree(self._binder, self._item, found, place=place, live=None)

    def _later(self, step: Callable[[], None]) -> None:
        self._binder.installs.append(step)

    def _differs(self, live: object, found: Value, place: str) -> object:
        self._binder.differs(place, "value", expected=_kind(live), found=_kind(found))
        return live

    def _tensor(self, live: torch.Tensor, found: Value, place: str) -> object:
        if type(found) is ArrayReference:
            wanted = ArrayId("extra", found.item, found.name, "")
            if is_sparse(live) and wanted in self._binder.listing.composites:
                return referred_anew(self._binder, found, device=live.device)
            every = self._held(found, live, place)
            for held in every:
                self._binder.fill(held)
            if all(held.spec.id != wanted for held in every) and self._binder.names.array(wanted) is not None:
                self._binder.know(wanted)
        elif type(found) is not ArrayValue:
            self._differs(live, found, place)
        elif found.shape != tuple(live.shape):
            self._binder.differs(place, "shape", expected=str(tuple(live.shape)), found=str(found.shape))
        elif found.dtype != dtype_name(live.dtype):
            self._binder.differs(place, "dtype", expected=str(live.dtype), found=found.dtype)
        else:
            self._later(lambda: copy_into(live, found))
        return live

    def _held(self, found: ArrayReference, live: torch.Tensor, place: str) -> tuple[HeldArray, ...]:
        binder, name = self._binder, _below(self._item, place)
        wanted = ArrayId("extra", found.item, found.name, "")
        if binder.listing.is_own(wanted):
            return hold(wanted, live, role="other", job=binder.job, holders=own_holders(binder.job))
        return hold_tensor(self._item, name, live, job=binder.job, identities=binder.identities)

    def _large_numpy(self, live: object, found: ArrayReference) -> object:
        """A large array of numpy is read into the one that stands there where that can hold it, else into a new one."""
        id_ = ArrayId("extra", found.item, found.name, "")
        spec = self._binder.listing.arrays.get(id_)
        if not isinstance(live, numpy.ndarray) or spec is None or not live.flags.writeable:
            return referred_anew(self._binder, found)
        if (live.shape, live.dtype.name) != (spec.shape, spec.dtype) or not live.dtype.isnative or not shares(live):
            return referred_anew(self._binder, found)
        for held in hold(id_, tensor_over(live), role="other", job=self._binder.job, holders=own_holders(self._binder.job)):
            self._binder.fill(held)
        return live

    def _numpy(self, live: numpy.ndarray[Any, Any], found: ArrayValue) -> object:
        new = numpy.asarray(revived_leaf(found))
        if (new.shape, new.dtype) != (live.shape, live.dtype) or not live.flags.writeable:
            return new
        self._later(lambda: live.__setitem__(..., new))
        return live

    def _dict(self, live: dict[Any, Any], found: Value, place: str) -> object:
        saved = dict(found) if isinstance(found, dict) else {}
        if not live and not holds_tensors(found):
            new = self._new(found, place)
            self._later(lambda: _refill(live, new))
            return live
        if _state_dict_of_optimizer(live) and _state_dict_of_optimizer(saved) and len(live["state"]) < len(saved["state"]):
            have, had = len(live["state"]), len(saved["state"])
            hint = "put the optimizer itself into `state`, in place of its state_dict(): it makes the states that it lacks"
            self._binder.differs(place, "value", expected=f"states of {have} parameters", found=f"states of {had}; {hint}")
            return live
        if bind_dict(self._binder, self._item, live, saved, below=_below(self._item, place)):
            return live
        for key in live.keys() - saved.keys():
            self._binder.missing(f"{place}/{token(key)}", _kind(live[key]))
        for key, value in saved.items():
            where = f"{place}/{token(key)}"
            if key not in live:
                if not _only_tensors(value):  # a tensor may be another rank's: all ranks together find what nobody has
                    self._binder.unexpected(where, _kind(value))
                continue
            new = self.settled(live[key], value, where)
            if new is not live[key]:
                self._later(lambda key=key, new=new: live.__setitem__(key, new))  # type: ignore[misc]
        return live

    def _named_tuple(self, live: tuple[Any, ...], found: Value, place: str) -> object:
        expected = (type_name(type(live)), type(live)._fields)  # type: ignore[attr-defined]
        if not isinstance(found, NamedTupleValue) or (found.type, found.fields) != expected:
            return self._differs(live, found, place)
        settled = (
            self.settled(one, other, f"{place}/{k}") for one, other, k in zip(live, found.values, found.fields, strict=True)
        )
        new = tuple(settled)
        return live if all(one is other for one, other in zip(live, new, strict=True)) else tuple.__new__(type(live), new)

    def _sequence(self, live: list[Any] | tuple[Any, ...] | deque[Any], found: Any, place: str) -> object:
        if isinstance(live, deque) and live.maxlen != found.maxlen:
            return self._differs(live, found, place) if holds_tensors(found) else self._new(found, place)
        if len(live) != len(found):
            if holds_tensors(found) or any(True for _ in tensors_at(live, place)):
                return self._differs(live, found, place)
            made: Any = self._new(found, place)
            if isinstance(live, tuple):
                return made
            self._later(lambda: _refill_sequence(live, made))
            return live
        new = [self.settled(one, other, f"{place}/{k}") for k, (one, other) in enumerate(zip(live, found, strict=True))]
        if isinstance(live, tuple):
            return live if all(one is other for one, other in zip(live, new, strict=True)) else tuple(new)
        self._later(lambda: _refill_sequence(live, new))
        return live


_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_LEAVES = (numpy.ndarray, numpy.generic, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _state_dict_of_optimizer(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a dict is what torch's optimizers return from `state_dict`."""
    return isinstance(value, dict) and isinstance(value.get("state"), dict) and isinstance(value.get("param_groups"), list)


def _opaque(live: object) -> bool:
    """An object that no checkpoint holds: it cannot be replaced by a plain value without a word."""
    return not isinstance(live, (*_CONTAINERS, *_LEAVES))


def _kind(value: object) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return f"a {type(value).__name__} with {len(value)} keys"
    return shown(value)


def _only_tensors(found: Value) -> bool:
    return all(map(_only_tensors, found.values())) if type(found) is dict else type(found) is ArrayReference


def _refill(live: Any, new: Any) -> None:
    live.clear()
    live.update(new)


def _refill_sequence(live: list[Any] | deque[Any], new: Any) -> None:
    live.clear()
    live.extend(new)


def _below(item: str, place: str) -> str:
    return place[len(place_of(item)) + 1 :]


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


def tensors_at(value: object, place: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a tree that stands at `place`, each with its own place."""
    if isinstance(value, torch.Tensor):
        yield place, value
    for name, one in children(value):
        yield from tensors_at(one, f"{place}/{name}")
