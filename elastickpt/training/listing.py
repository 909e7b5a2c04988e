"""What loading takes and gives: a checkpoint's contents as a Listing, and a Binding of them to this process's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from elastickpt.format.array_columns import ArrayColumns
from elastickpt.format.arrays import ArrayId, ArraySpec, Box, Mesh, id_key
from elastickpt.format.records import Item, OptimizerTable
from elastickpt.format.strict_reading import IntColumn
from elastickpt.format.values import Value
from elastickpt.training.composites import Path, Saved, composition_in
from elastickpt.training.dtensors import whole_id
from elastickpt.training.elements import DimOrder
from elastickpt.training.held import HeldArray
from elastickpt.training.rng import Continuation
from elastickpt.training.values import place_of

DifferenceKind = Literal["missing", "unexpected", "shape", "dtype", "value"]
FoundOn = Literal["in this process", "in the checkpoint", "both"]


@dataclass(frozen=True, slots=True, order=True)
class Mismatch:
    """One difference between this process's state (`expected`) and the checkpoint (`found`).

    `name` is an ArrayId's text or a value's place. `side` is where the thing is: `missing` is in this process only,
    `unexpected` in the checkpoint only, all else on both sides.
    """

    name: str
    what: DifferenceKind
    expected: str
    found: str
    side: FoundOn

    def __str__(self) -> str:
        sides = f"expected {self.expected} (in this process), found {self.found} (in the checkpoint)"
        return f"{self.name}: {self.what}: {sides}"


def _unread(id_: ArrayId) -> torch.Tensor:
    raise LookupError(f"array {id_}: this listing reads nothing")


@dataclass(frozen=True, eq=False)
class Listing:
    """What a checkpoint holds, before any array is read.

    `tables` has one table for each optimizer item, merged from all writers. `values` maps places to replicated values;
    `per_rank(writer)` reads one writer's own, and is called only for what needs it. `same_layout` says that ranks hold
    now what the writers of the same number held: same world size, meshes and placements. `tied` are groups of (item,
    name) that were one tensor; only one of a group is among `arrays`. `step` counts completed optimizer steps. `ranks` are
    those that load. `attributes` are those of arrays that have some; `read(id)` reads one array whole, and is called only for
    what needs it. `layouts` are mesh and placements of the arrays of section `extra` that lay on one. `columns` are the same
    arrays as the index has them; where there are none, each is looked for among `arrays`.
    """

    arrays: Mapping[ArrayId, ArraySpec]
    tables: tuple[OptimizerTable, ...]
    values: Mapping[str, Value]
    per_rank: Callable[[int], Mapping[str, Value]]
    items: tuple[Item, ...]
    world_size: int
    same_layout: bool
    step: int | None = None
    tied: tuple[tuple[tuple[str, str], ...], ...] = ()
    ranks: tuple[int, ...] = (0,)
    attributes: Mapping[ArrayId, Mapping[str, Value]] = field(default_factory=dict)
    read: Callable[[ArrayId], torch.Tensor] = _unread
    layouts: Mapping[ArrayId, tuple[Mesh, tuple[str, ...]]] = field(default_factory=dict)
    columns: ArrayColumns = field(default_factory=lambda: ArrayColumns.of(()))

    def order(self, id_: ArrayId) -> DimOrder:
        """How the axes of a tensor lay in memory; () for their own order."""
        found = self.attributes.get(id_, {}).get("axis_order", ())
        return tuple(found) if isinstance(found, list) and sorted(found) == list(range(len(found))) else ()

    def is_own(self, id_: ArrayId) -> bool:
        """Whether it is an array of one rank alone, or a composite tensor of such arrays. [UCF-111]"""
        saved = self.composites.get(id_)
        parts = (id_,) if saved is None else tuple(saved.parts.values())
        return any("rank" in self.attributes.get(part, {}) for part in parts)

    @cached_property
    def composites(self) -> Mapping[ArrayId, Saved]:
        """Composite tensors by the id that a plain tensor would have in their place. [UCF-108]"""
        found: dict[ArrayId, tuple[dict[str, Any], dict[Path, ArrayId]]] = {}
        for id_, attributes in self.attributes.items():
            composition, path = composition_in(attributes)
            if composition is not None:
                found.setdefault(whole_id(id_, path), (composition, {}))[1][path] = id_
        return {id_: Saved(composition, parts) for id_, (composition, parts) in found.items()}


@dataclass(frozen=True, slots=True, eq=False)
class TargetColumns:
    """Plain local tensors in host memory to fill, without gaps, in C order, each a box of one array: `places` are those of the
    arrays in the listing's columns, and `box` says which of `boxes` each is. `held_alone` as in `HeldArray`."""

    places: IntColumn
    boxes: Sequence[Box]
    box: IntColumn
    tensors: Sequence[torch.Tensor]
    held_alone: bool


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """How this rank's state takes the checkpoint. Making it has changed nothing.

    `targets` are the tensors to fill, each with the id that its array has in the checkpoint; several may name one array
    (tied there, apart here). `mismatches` is complete for this rank but for what only all ranks together know: `arrays`
    and
    `places` are what this rank has a place for, and what no rank has one for is `unexpected(...)`.
    `ties`: a target, and another array of the checkpoint that is tied to it here, so that only one of the two can be taken.
    `columns` are targets too, and known without being among `arrays`.
    `install()` is called once, after all targets were filled, on all ranks; without collectives. Until then optimizers,
    schedulers, other objects and random streams are as they were. `streams` are what it sets of random streams.
    """

    targets: tuple[HeldArray, ...]
    mismatches: tuple[Mismatch, ...]
    notes: tuple[str, ...]
    arrays: frozenset[ArrayId]
    places: frozenset[str]
    install: Callable[[], None]
    streams: tuple[Continuation, ...] = ()
    ties: tuple[tuple[HeldArray, ArrayId], ...] = ()
    columns: tuple[TargetColumns, ...] = ()


def unexpected(listing: Listing, *, arrays: Iterable[ArrayId] | None, places: Iterable[str]) -> Iterator[Mismatch]:
    """What the checkpoint has and no rank has a place for; `arrays` and `places` are the unions over all ranks'
    Bindings, None for every array.
    """
    if arrays is not None:
        known = frozenset(arrays)
        for id_, spec in listing.arrays.items():
            if id_ not in known and "rank" not in listing.attributes.get(id_, {}):  # a rank's own goes with its value
                yield Mismatch(str(id_), "unexpected", "nothing", f"{spec.dtype} {spec.shape}", "in the checkpoint")
    known_places = frozenset(places)
    items = (place_of(item.name) for item in listing.items if item.kind != "module")
    found = dict.fromkeys((*listing.values, *(place_of(table.item) for table in listing.tables), *items))
    for place in found:
        if place not in known_places:
            yield Mismatch(place, "unexpected", "nothing", "a value", "in the checkpoint")


class SavedNames:
    """Finds what this process calls (item, FQN) in a checkpoint that may have stored it under another tied name."""

    def __init__(self, listing: Listing, live_tied: Iterable[tuple[tuple[str, str], ...]]) -> None:
        self._listing = listing
        self._groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for group in (*live_tied, *listing.tied):
            for name in group:
                self._groups.setdefault(name, []).extend(other for other in group if other != name)

    def are_tied(self, item: str, names: Iterable[str]) -> bool:
        """Whether any of these has another name on either side."""
        return bool(self._groups) and any((item, name) in self._groups for name in names)

    def has_other(self, item: str, name: str) -> bool:
        """Whether this one has another name on either side."""
        return (item, name) in self._groups

    def alias(self, live: tuple[str, str], stored: tuple[str, str]) -> None:
        """From now on finds what this process calls `live` under the name `stored` too: a model's own loading renames it."""
        self._groups.setdefault(live, []).append(stored)

    def candidates(self, item: str, name: str) -> tuple[tuple[str, str], ...]:
        """(item, name) itself, then the names that are tied to it on either side."""
        return tuple(dict.fromkeys(((item, name), *self._groups.get((item, name), ()))))

    def arrays(self, wanted: ArrayId) -> tuple[ArrayId, ...]:
        """The ids under which the checkpoint stores `wanted`: its own first, then those tied to it on either side.

        A parameter's value may be tied to a tensor elsewhere in `state`, which stands in section `extra`.
        """
        if (wanted.item, wanted.name) not in self._groups:
            return (wanted,) if wanted in self._listing.arrays else ()
        found = []
        for item, name in self.candidates(wanted.item, wanted.name):
            found.append(ArrayId(wanted.section, item, name, wanted.state))
            if wanted.state == "value":
                found.append(ArrayId("extra", item, name, ""))
            elif wanted.section == "extra":
                found.append(ArrayId("params", item, name, "value"))
        return tuple(id_ for id_ in found if id_ in self._listing.arrays)

    def array(self, wanted: ArrayId) -> ArrayId | None:
        """The id under which the checkpoint stores `wanted`; None when it does not."""
        return next(iter(self.arrays(wanted)), None)

    @cached_property
    def states(self) -> Mapping[tuple[str, str], tuple[str, ...]]:
        """(item, name) in the checkpoint -> the states that it stores of it as arrays."""
        found: dict[tuple[str, str], list[str]] = {}
        for section, item, name, state in self._listing.columns.by_id or map(id_key, self._listing.arrays):
            if section == "params":
                found.setdefault((item, name), []).append(state)
        return {key: tuple(states) for key, states in found.items()}
