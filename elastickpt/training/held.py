"""Live state as fragments: what this rank holds of each array, and what it holds besides arrays.

Shapes and boxes are in elements and in global coordinates of the array; `tensor` is the local tensor, which has exactly the
shape of `box` (checked here), any strides, any device.

What was found out about a tensor in the last capture is kept for the next one: all but its memory.

    tensor (by identity) -> where it lies, as long as everything that this follows from is still the same:
                            its array, role and holders; its DTensor spec; its local shape, strides and element type

A capture then costs 10 µs a tensor instead of 35. Nothing here keeps a tensor alive: an entry of one that is gone is of no
use to another tensor with its address, as that one would have to agree in all of the above, and then the entry holds for it.
Of a dict of nothing but plain tensors, or of nothing but DTensors, all is kept in columns, by its place: 3 µs a tensor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import repeat
from operator import attrgetter, ge, is_, mul
from typing import Any, Literal

import torch

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.arrays import ArrayId, ArraySpec, Box, Mesh, Section
from elastickpt.format.many import many
from elastickpt.format.records import Item, OptimizerTable
from elastickpt.format.values import Value

Sharing = Literal["placed", "declared", "undeclared"]
Kept = Literal["equal", "broadcast", "loose"]
Role = Literal["parameter", "buffer", "other"]


@dataclass(frozen=True, slots=True, eq=False)
class HeldArray:
    """This rank's part of one array: a held piece, whose offset and strides are those of `tensor`.

    `sharing` says who else holds the same elements:
    `placed`: decided by `mesh` and `placements` (a DTensor): ranks that differ only along replicated axes hold the same box.
    `declared`: all of `replicas` hold it (DDP's group, `fully_shard`'s mesh for a buffer, `mesh=`, or only this rank).
    `undeclared`: a plain tensor; ranks with the same array are replicas if their contents are equal, else it is refused.
    `kept` says what keeps a declared one `equal`: training itself. `broadcast`: a buffer under DDP, which gives the first
    one's to all in a forward. `loose`: nothing, as it is a buffer below `fully_shard`, or DDP has `broadcast_buffers=False`.
    `role`: parameters and their optimizer state are split by bytes over replicas; all else is written whole by the first.
    """

    spec: ArraySpec
    box: Box
    tensor: torch.Tensor
    role: Role
    sharing: Sharing
    mesh: Mesh | None = None
    placements: tuple[str, ...] = ()  # one an axis of `mesh`: "R", "S(0)", "_S(0)"
    replicas: tuple[int, ...] = ()
    attributes: tuple[tuple[str, Value], ...] = ()
    kept: Kept = "equal"
    order: tuple[int, ...] = ()  # its axes by falling stride, () for their own order or where any order says the same

    def __post_init__(self) -> None:
        if (self.tensor.shape != self.box.stop or any(self.box.start)) and self.tensor.shape != self.box.shape:
            raise LayoutUnsupported(
                f"array {self.spec.id}: its box {self.box} has shape {self.box.shape}, "
                f"this rank's local tensor has shape {tuple(self.tensor.shape)}"
            )

    @property
    def held_alone(self) -> bool:
        """Whether no other rank is known to hold the same elements."""
        if self.sharing == "placed":
            return self.mesh is None or not is_repeated(self.mesh, self.placements)
        return len(self.replicas) == 1


def is_repeated(mesh: Mesh, placements: Sequence[str]) -> bool:
    """Whether several ranks of a mesh hold the same elements of what is placed so."""
    return any(size > 1 and placement == "R" for size, placement in zip(mesh.sizes, placements, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class LiveState:
    """All that this rank contributes to a save.

    `values` are the same on all ranks that have them (compared by digest), keyed by JSON pointer ("/scheduler/last_epoch" is
    inside the tree stored under "/scheduler": one entry for each item or typed part). `per_rank` are this rank's own.
    `tied` lists groups of (item, FQN) that are one tensor in memory; only the first of a group is among `arrays`.
    """

    arrays: tuple[HeldArray, ...]
    items: tuple[Item, ...]
    tables: tuple[OptimizerTable, ...] = ()
    values: Mapping[str, Value] = field(default_factory=dict)
    per_rank: Mapping[str, Value] = field(default_factory=dict)
    tied: tuple[tuple[tuple[str, str], ...], ...] = ()

    @property
    def sections(self) -> frozenset[Section]:
        """Of the arrays."""
        return frozenset(held.spec.id.section for held in self.arrays)


JOBS = 4  # states of different keys whose tensors are remembered


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """How a tensor lay. `cause` is all that it follows from and that is compared by identity."""

    array: ArrayId
    role: Role
    cause: tuple[object, ...]
    shape: torch.Size
    dtype: torch.dtype
    spec: ArraySpec
    box: Box
    sharing: Sharing
    mesh: Mesh | None
    placements: tuple[str, ...]
    replicas: tuple[int, ...]
    kept: Kept
    strides: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, held: HeldArray, local: torch.Tensor, *, role: Role, cause: tuple[object, ...]) -> Seen | None:
        """None for what is held in another form than as it is: as bytes, or in parts."""
        if held.attributes or held.tensor.shape != local.shape or held.tensor.dtype != local.dtype:
            return None
        rest = (held.sharing, held.mesh, held.placements, held.replicas, held.kept, local.stride(), held.order)
        return cls(held.spec.id, role, cause, local.shape, local.dtype, held.spec, held.box, *rest)

    def again(self, local: torch.Tensor) -> HeldArray:
        """The same of the tensor as it is now."""
        how = (self.role, self.sharing, self.mesh, self.placements, self.replicas)
        return HeldArray(self.spec, self.box, local.detach(), *how, kept=self.kept, order=self.order)


_LIE = attrgetter("layout", "is_meta", "dtype", "shape")
_STRIDE, _IS_NEGATIVE, _OFFSET = torch.Tensor.stride, torch.Tensor.is_neg, torch.Tensor.storage_offset
_NEEDS_GRADIENT = attrgetter("requires_grad")
_HAS = attrgetter("nbytes")
_STORAGE, _NBYTES, _ITEMSIZE = torch.Tensor.untyped_storage, torch.UntypedStorage.nbytes, attrgetter("itemsize")


@dataclass(frozen=True, slots=True, eq=False)
class SeenDict:
    """How the tensors of a dict lay, by its keys in their order, and what stands in a checkpoint in place of the dict: one
    object for all captures, which nobody changes. `holders` are those of the plain ones, `cause` is what the places of
    DTensors follow from beside that, compared by identity."""

    keys: tuple[str, ...]
    tree: Value
    specs: tuple[ArraySpec, ...]
    columns: Mapping[str, Sequence[Any]]  # of the arrays, all but `spec` and `tensor`
    holders: tuple[Sharing, tuple[int, ...], Kept]
    cause: tuple[object, ...]
    lie: list[Any]
    strides: list[tuple[int, ...]]
    reach: tuple[int, ...]  # bytes from a tensor's first element on

    @classmethod
    def of(
        cls,
        tree: Mapping[str, Value],
        held: Sequence[HeldArray],
        tensors: Sequence[torch.Tensor],
        holders: tuple[Sharing, tuple[int, ...], Kept],
        cause: Sequence[object],
    ) -> SeenDict | None:
        """Of local tensors that `lie_plainly`, each held as the one that it is. None where more than where they lie may change:
        the conjugation of complex ones."""
        if any(one.dtype.is_complex for one in tensors):
            return None
        return cls(
            tuple(tree),
            tree,
            tuple(one.spec for one in held),
            {name: list(map(attrgetter(name), held)) for name in _SAME},
            holders,
            tuple(cause),
            list(map(_LIE, tensors)),
            list(map(_STRIDE, tensors)),
            tuple(map(_HAS, tensors) if all(map(torch.Tensor.is_contiguous, tensors)) else map(_reach, tensors)),
        )

    def again(
        self,
        tensors: Sequence[torch.Tensor],
        holders: tuple[Sharing, tuple[int, ...], Kept],
        cause: Sequence[object],
    ) -> list[HeldArray] | None:
        """The same of local tensors as they are now; None if one lies otherwise, or its memory is gone."""
        if holders != self.holders or len(cause) != len(self.cause) or not all(map(is_, cause, self.cause)):
            return None
        try:
            if list(map(_LIE, tensors)) != self.lie or list(map(_STRIDE, tensors)) != self.strides:
                return None
        except RuntimeError:  # of a nested tensor, which has neither
            return None
        if any(map(_IS_NEGATIVE, tensors)) or any(getattr(tensor, "_st_info", None) is not None for tensor in tensors):
            return None
        room, offsets = map(_NBYTES, map(_STORAGE, tensors)), list(map(_OFFSET, tensors))
        if any(offsets):
            ends = map(mul, offsets, map(_ITEMSIZE, tensors))
            reach = [end + own if own else 0 for end, own in zip(ends, self.reach, strict=True)]
        else:
            reach = list(self.reach)
        if not all(map(ge, room, reach)):
            return None
        return many(HeldArray, len(tensors), spec=self.specs, tensor=outside_autograd(tensors), **self.columns)


_SAME = tuple(field.name for field in fields(HeldArray) if field.name not in ("spec", "tensor"))


def held_alike(
    specs: Sequence[ArraySpec],
    boxes: Iterable[Box],
    tensors: Sequence[torch.Tensor],
    held: tuple[Sharing, tuple[int, ...], Kept],
    orders: Iterable[tuple[int, ...]],
) -> list[HeldArray]:
    """Plain tensors, each of the shape of its box, which are no parameters and are held by the same ranks."""
    sharing, replicas, kept = held
    return many(
        HeldArray,
        len(specs),
        spec=specs,
        box=boxes,
        tensor=outside_autograd(tensors),
        role=repeat("other"),
        sharing=repeat(sharing),
        mesh=repeat(None),
        placements=repeat(()),
        replicas=repeat(replicas),
        attributes=repeat(()),
        kept=repeat(kept),
        order=orders,
    )


def outside_autograd(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The same memory, of which no graph knows: plain tensors that need no gradients themselves, as a view costs 1 µs."""
    return [tensor.detach() for tensor in tensors] if any(map(_NEEDS_GRADIENT, tensors)) else tensors


def _reach(tensor: torch.Tensor) -> int:
    if tensor.is_contiguous() or tensor.numel() == 0:
        return tensor.nbytes
    return (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


class Memo:
    """Entries of one capture and of the one before: it forgets what a capture did not ask for."""

    def __init__(self) -> None:
        self._last: dict[int, Seen] = {}
        self._now: dict[int, Seen] = {}
        self._dicts: tuple[dict[str, SeenDict], dict[str, SeenDict]] = {}, {}  # of the capture before, and of this one
        self._distinct: tuple[ArraySpec, ...] = ()

    def find(
        self, tensor: torch.Tensor, local: torch.Tensor, array: ArrayId, role: Role, cause: tuple[object, ...]
    ) -> HeldArray | None:
        """How this rank holds the tensor, if all is as it was; `local` is its local tensor, plain and strided."""
        seen = self._last.get(id(tensor))
        if seen is None or seen.shape != local.shape or seen.dtype is not local.dtype or seen.array != array:
            return None
        if seen.role != role or seen.strides != local.stride() or len(seen.cause) != len(cause):
            return None
        for mine, theirs in zip(seen.cause, cause, strict=True):
            if mine is not theirs:
                return None
        self._now[id(tensor)] = seen
        return seen.again(local)

    def put(self, tensor: torch.Tensor, seen: Seen | None) -> None:
        """For the next capture."""
        if seen is not None:
            self._now[id(tensor)] = seen

    def find_dict(self, place: str, keys: tuple[str, ...]) -> SeenDict | None:
        """The dict that stood there."""
        found = self._dicts[0].get(place)
        return found if found is not None and found.keys == keys else None

    def put_dict(self, place: str, seen: SeenDict | None) -> None:
        """For the next capture."""
        if seen is not None:
            self._dicts[1][place] = seen

    def distinct(self, arrays: Sequence[HeldArray]) -> bool:
        """Whether these were found to have distinct names."""
        if len(arrays) != len(self._distinct):
            return False
        return all(held.spec is spec for held, spec in zip(arrays, self._distinct, strict=True))

    def put_distinct(self, arrays: Sequence[HeldArray]) -> None:
        """They have."""
        self._distinct = tuple(held.spec for held in arrays)

    def turn(self) -> None:
        """A capture has ended."""
        self._last, self._now = self._now, {}
        self._dicts = self._dicts[1], {}


class Memos:
    """Those of the newest states, by what captures of one state have in common. Safe from any thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Memo] = OrderedDict()
        self._changing = threading.Lock()

    @contextmanager
    def remembering(self, key: Hashable) -> Iterator[Memo]:
        """The memo of captures with this key; nobody else has it meanwhile."""
        with self._changing:
            memo = self._kept.pop(key, None) or Memo()
        yield memo
        memo.turn()  # not after an error: half a capture is none
        with self._changing:
            self._kept[key] = memo
            while len(self._kept) > JOBS:
                self._kept.popitem(last=False)
