"""Which tensors of `state` are one object: ties between names, and the parameters of optimizers by the names that the models of
`state` give them, and how each of them lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch.optim import Optimizer

from elastickpt.errors import LayoutUnsupported, StructureConflict, fault
from elastickpt.format.arrays import Box
from elastickpt.format.tables import TableName
from elastickpt.training.dtensors import DTensorParts, Holders, box_of, placed
from elastickpt.training.elements import is_loaded_instance
from elastickpt.training.held import HeldArray, Role


@dataclass(frozen=True, slots=True, eq=False)
class KnownTensor:
    """A tensor of `state` under the first name at which it was met.

    `held` is what this rank holds of it: nothing on a rank outside its mesh, several arrays for a composite tensor.
    `holders` is for what belongs to it: a plain optimizer state of this parameter is held by the same ranks.
    """

    item: str
    name: str
    tensor: torch.Tensor
    role: Role
    held: tuple[HeldArray, ...]
    holders: Holders


@dataclass(frozen=True, slots=True, eq=False)
class _Together:
    """Tensors that were met at once; few of them are ever asked for."""

    item: str
    names: Sequence[str]
    tensors: Sequence[torch.Tensor]
    held: Callable[[int], HeldArray]
    holders: Holders

    def known(self, place: int) -> KnownTensor:
        return KnownTensor(self.item, self.names[place], self.tensors[place], "other", (self.held(place),), self.holders)


class Identities:
    """Tensors of `state` by identity, in the order in which they were met; kept alive, so that no id is used again."""

    def __init__(self) -> None:
        self._known: dict[int, KnownTensor | tuple[_Together, int]] = {}
        self._aliases: dict[int, list[tuple[str, str]]] = {}  # of those that have several names, all

    def find(self, tensor: torch.Tensor) -> KnownTensor | None:
        """The first name of this tensor object, None if it was not met."""
        return self._at(id(tensor))

    def _at(self, number: int) -> KnownTensor | None:
        found = self._known.get(number)
        if isinstance(found, tuple):
            found = self._known[number] = found[0].known(found[1])
        return found

    def add(self, known: KnownTensor) -> None:
        """Records a tensor that was not met before."""
        self._known[id(known.tensor)] = known

    def are_new(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether none of these was met before, nor twice among them."""
        ids = set(map(id, tensors))
        return len(ids) == len(tensors) and ids.isdisjoint(self._known)

    def add_all(
        self,
        item: str,
        names: Sequence[str],
        tensors: Sequence[torch.Tensor],
        held: Callable[[int], HeldArray],
        holders: Holders,
    ) -> None:
        """Records tensors that are new, and are no parameters: each is one array, `held` of its place."""
        together = _Together(item, names, tensors, held, holders)
        self._known.update(zip(map(id, tensors), zip(repeat(together), range(len(tensors)), strict=False), strict=False))

    def alias(self, tensor: torch.Tensor, item: str, name: str) -> None:
        """Records one more name of a tensor that was met before; the same name again changes nothing."""
        known = self._at(id(tensor))
        if known is None:
            raise fault("a tensor has one more name, and no first one")
        names = self._aliases.setdefault(id(tensor), [(known.item, known.name)])
        if (item, name) not in names:
            names.append((item, name))

    def tied(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        """Groups of (item, name) that are one tensor; only the first of each group is stored."""
        groups = (self._aliases[number] for number in self._known if number in self._aliases) if self._aliases else ()
        return tuple(tuple(names) for names in groups if len(names) > 1)

    def alone(self) -> Iterator[KnownTensor]:
        """Those that were not added with others."""
        return (found for found in self._known.values() if not isinstance(found, tuple))

    def __iter__(self) -> Iterator[KnownTensor]:
        return (found for number in tuple(self._known) if (found := self._at(number)) is not None)


ZERO = ("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer")


@dataclass(frozen=True, slots=True, eq=False)
class Lying:
    """How a parameter lies, for the states beside it: the whole's `shape`, and this rank's `box` in it.

    `own` are a DTensor's parts; `sharded` says that other ranks hold other elements. `held` is the parameter's own
    array (one of a composite tensor's).
    """

    own: DTensorParts | None
    held: HeldArray
    box: Box
    shape: tuple[int, ...]
    sharded: bool


@dataclass(frozen=True, slots=True, eq=False)
class OwnedParameter:
    """A parameter of an optimizer: the tensor in its group, and what the models of `state` say about it.

    `lying` is None on a rank outside the parameter's mesh.
    """

    parameter: torch.Tensor
    group: int
    known: KnownTensor
    lying: Lying | None

    @property
    def name(self) -> TableName:
        """(model item, FQN)"""
        return self.known.item, self.known.name


def owned_parameters(item: str, optimizer: Optimizer, identities: Identities) -> tuple[OwnedParameter, ...]:
    """The optimizer's parameters with their names, in the order of its groups.

    Raises LayoutUnsupported for an optimizer that spreads whole states over ranks; StructureConflict for a parameter,
    or a tensor that state is kept for, that is nowhere in `state`.
    """
    if is_loaded_instance(optimizer, *ZERO):
        raise LayoutUnsupported(
            f"optimizer {item!r}: ZeroRedundancyOptimizer keeps the states of a parameter on one rank only, which "
            f"nothing here says; shard the model with torch.distributed.fsdp.fully_shard"
        )
    params = []
    for index, group in enumerate(groups_of(optimizer)):
        for parameter in group["params"]:
            known = identities.find(parameter)
            if known is None or known.role == "buffer":
                raise StructureConflict(_nameless(item, index, parameter, identities))
            params.append(OwnedParameter(parameter, index, known, _lying(known)))
    ids = {id(param.parameter) for param in params}
    for key in states_of(optimizer):
        if isinstance(key, torch.Tensor) and id(key) not in ids:
            raise StructureConflict(
                f"optimizer {item!r}: it keeps state for a tensor of shape {tuple(key.shape)} that is in none of its groups"
            )
    return tuple(params)


def _nameless(item: str, group: int, parameter: torch.Tensor, identities: Identities) -> str:
    """Why a parameter has no name, and what to do."""
    shape = tuple(parameter.shape)
    which = f"optimizer {item!r}: a parameter of group {group}, of shape {shape}, is not in `state`, so it has no name"
    models = [known for known in identities if known.role == "parameter"]
    alike = [known for known in models if known.tensor is not parameter and tuple(known.tensor.shape) == shape]
    sharded = next((known for known in alike if placed(parameter) is None and placed(known.tensor) is not None), None)
    if sharded is not None:
        return (
            f"{which}; model {sharded.item!r} has a sharded one of this shape, {sharded.name!r}: the optimizer was made before "
            f"fully_shard (or parallelize_module) replaced the model's parameters, so make it afterwards"
        )
    if alike:
        return (
            f"{which}; model {alike[0].item!r} has another of this shape, {alike[0].name!r}: either the optimizer was made "
            f"from a copy, or before the model's parameters were replaced, so make it from the model that stands in `state`, "
            f"or put this parameter into `state` too"
        )
    return (
        f"{which}; put the model that it belongs to into `state` beside the optimizer, or ek.trainable(model), or the "
        f"parameter itself or a dict of such"
    )


def _lying(known: KnownTensor) -> Lying | None:
    if not known.held:
        return None
    own = placed(known.tensor)
    held = next((each for each in known.held if each.mesh is not None), known.held[0])
    ndim = len(own.shape) if own is not None else known.tensor.ndim
    box, shape = held.box, held.spec.shape
    if held.spec.id.state != "value" and known.role == "parameter":  # a part of a composite tensor, of any shape
        shape = tuple(known.tensor.shape)
        box = Box.whole(shape) if own is None else box_of(own)
    if len(shape) != ndim:  # stored as bytes, with an axis for them at the end
        box, shape = Box(box.start[:ndim], box.stop[:ndim]), shape[:ndim]
    if held.mesh is None:
        return Lying(own, held, box, shape, box.shape != shape)
    axes = zip(held.mesh.sizes, held.placements, strict=True)
    return Lying(own, held, box, shape, any(size > 1 and placement != "R" for size, placement in axes))


def states_of(optimizer: Optimizer) -> dict[Any, Any]:
    """`optimizer.state`: by parameter, and whatever else an optimizer uses as key."""
    found: dict[Any, Any] = getattr(optimizer, "state", _NO_STATES)
    return found


_NO_STATES: dict[Any, Any] = {}  # of an optimizer that never called torch's own __init__


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """`optimizer.param_groups`; none for an optimizer that never called torch's own __init__."""
    found: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    return found
