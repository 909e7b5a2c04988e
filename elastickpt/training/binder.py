"""A Binding while it is being made: what the parts of `bind` add to, and how they look things up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.arrays import ArrayId, Box, id_key
from elastickpt.format.encode_values import typed_key
from elastickpt.format.values import ArrayReference, Value
from elastickpt.training.composites import SPARSE, composition_in, differing, require_indices
from elastickpt.training.dtensors import JobView, whole_id
from elastickpt.training.elements import lie_in_order, lie_plainly, mark_changed
from elastickpt.training.entries import Install, code_of, entry_name, install_all
from elastickpt.training.held import HeldArray
from elastickpt.training.listing import Binding, DifferenceKind, Listing, Mismatch, SavedNames, TargetColumns
from elastickpt.training.parameters import Identities
from elastickpt.training.rng import Continuation
from elastickpt.training.trees import mapped
from elastickpt.training.values import array_value


@dataclass(slots=True, eq=False)
class Binder:
    """Collects what one rank's Binding will hold. `identities` knows the tensors of all models of `state` already.

    `installs` are the steps of the entry that is being bound; see `entry`. `changed` are tensors whose contents change with
    targets in `columns` that show no more than their memory: DTensors. `filled` are parameters and buffers in `columns`.
    """

    listing: Listing
    job: JobView
    identities: Identities
    names: SavedNames
    targets: list[HeldArray] = field(default_factory=list)
    columns: list[TargetColumns] = field(default_factory=list)
    changed: list[torch.Tensor] = field(default_factory=list)
    filled: set[ArrayId] = field(default_factory=set)
    ties: list[tuple[HeldArray, ArrayId]] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    arrays: set[ArrayId] = field(default_factory=set)
    places: set[str] = field(default_factory=set)
    installs: list[Callable[[], None]] = field(default_factory=list)
    streams: list[Continuation] = field(default_factory=list)
    _entries: list[Install] = field(default_factory=list)
    _read: dict[int, Mapping[str, Value]] = field(default_factory=dict)

    @contextmanager
    def entry(self, key: str, value: object) -> Iterator[None]:
        """What is bound inside belongs to this entry, whose code is to blame for what it raises, now and in `install()`."""
        name = entry_name(key, value)
        with code_of(name, doing="taking its state"):
            yield
        if self.installs:
            self._entries.append(Install(name, tuple(self.installs)))
            self.installs.clear()

    def missing(self, name: str, expected: str) -> None:
        """This process has it, the checkpoint does not."""
        self.mismatches.append(Mismatch(name, "missing", expected, "nothing", "in this process"))

    def unexpected(self, name: str, found: str) -> None:
        """The checkpoint has it, this process does not."""
        self.mismatches.append(Mismatch(name, "unexpected", "nothing", found, "in the checkpoint"))

    def differs(self, name: str, what: DifferenceKind, *, expected: str, found: str) -> None:
        """Both have it, and it is not the same; each difference once."""
        if (mismatch := Mismatch(name, what, expected, found, "both")) not in self.mismatches[-8:]:
            self.mismatches.append(mismatch)

    def note(self, text: str) -> None:
        """Something that loading does differently from what one would assume; each text once."""
        self.notes[text] = None

    def fill(self, held: HeldArray) -> None:
        """Makes `held` a target, or records why it cannot be one."""
        name, found = str(held.spec.id), self.names.arrays(held.spec.id)
        if not found:
            if not self._is_of_another_kind(held, held.spec.id):
                self.missing(name, f"{held.spec.dtype} {held.spec.shape}")
            return
        self._know(*found)
        spec = self.listing.arrays[found[0]]
        if self._is_of_another_kind(held, found[0]):
            return
        if spec.shape != held.spec.shape:
            self.differs(name, "shape", expected=str(held.spec.shape), found=str(spec.shape))
        elif spec.dtype != held.spec.dtype:
            self.differs(name, "dtype", expected=held.spec.dtype, found=spec.dtype)
        else:
            target = held if spec == held.spec else replace(held, spec=spec)
            self.targets.append(target)
            self.ties += ((target, other) for other in found[1:])
            if not held.attributes:
                return
            live, path = composition_in(dict(held.attributes))
            if live is not None and (live["class"], path) == (SPARSE, ("indices",)):
                self.installs.append(lambda: require_indices(held.tensor, live["shape"]))

    def fill_all(self, held: Sequence[HeldArray]) -> None:
        """Makes targets of what has the checkpoint's own specs, of which nothing more is said."""
        self.targets += held
        self.arrays.update(one.spec.id for one in held)

    def fill_many(self, many: Iterable[HeldArray]) -> None:
        """`fill` of each: in columns what has the checkpoint's own specs, of which nothing more is said, in host memory without
        gaps, in C order."""
        columns, names = self.listing.columns, self.names
        by_id, shapes, dtypes = columns.by_id, columns.shapes, columns.bare_dtypes
        alike: list[tuple[int, HeldArray]] = []
        for held in many:
            spec, id_ = held.spec, held.spec.id
            place = by_id.get(id_key(id_), -1)
            if (
                place < 0
                or shapes[place] != spec.shape
                or dtypes[place] != spec.dtype
                or held.attributes
                or self.listing.composites
                or names.has_other(id_.item, id_.name)
            ):
                self.fill(held)
            else:
                alike.append((place, held))
        tensors = [held.tensor for _, held in alike]
        if not (lie_plainly(tensors) and lie_in_order(tensors)):
            mine = [lie_plainly((tensor,)) and lie_in_order((tensor,)) for tensor in tensors]
            self.fill_all([held for (_, held), fits in zip(alike, mine, strict=True) if not fits])
            alike = [one for one, fits in zip(alike, mine, strict=True) if fits]
        self.filled.update(held.spec.id for _, held in alike)
        places = [place for place, _ in alike]
        many = [held for _, held in alike]
        self.fill_places(places, [held.box for held in many], [held.tensor for held in many], many)

    def fill_places(
        self, places: Sequence[int], boxes: Sequence[Box], tensors: Sequence[torch.Tensor], like: Sequence[HeldArray]
    ) -> None:
        """Makes targets of tensors that `lie_plainly` and `lie_in_order`: of each, the place of its array in the listing's
        columns, the box of that which it is, and what the same ranks hold."""
        shapes, alone = self.listing.columns.shapes, dict[tuple[object, ...], bool]()
        apart: dict[bool, tuple[list[int], dict[tuple[tuple[int, ...], ...], Box], list[int], list[torch.Tensor]]] = {}
        numbers: dict[tuple[object, ...], int] = {}
        for place, box, tensor, held in zip(places, boxes, tensors, like, strict=True):
            holders = (held.sharing, id(held.mesh), held.placements, held.replicas)
            if (held_alone := alone.get(holders)) is None:
                held_alone = alone[holders] = held.held_alone
            at, known, box_of, own = apart.setdefault(held_alone, ([], {}, [], []))
            known.setdefault((box.start, box.stop, shapes[place]), box)
            at.append(place)
            box_of.append(numbers.setdefault((held_alone, box.start, box.stop, shapes[place]), len(known) - 1))
            own.append(tensor)
        for held_alone, (at, known, box_of, own) in apart.items():
            self.columns.append(TargetColumns(np.array(at), tuple(known.values()), np.array(box_of), own, held_alone))

    def _is_of_another_kind(self, held: HeldArray, id_: ArrayId) -> bool:
        """Whether this process's tensor and the checkpoint's are not both plain, or composites of one composition, or stored as
        the bytes of one element type; which is recorded. [UCF-110]"""
        if not held.attributes and not self.listing.composites and id_ not in self.listing.attributes:
            return False  # nothing is said of either: the usual case
        live, path = composition_in(dict(held.attributes))
        whole = whole_id(id_, path)
        saved = self.listing.composites.get(whole)
        if saved is not None and (live is None or typed_key(live) != typed_key(saved.composition)):
            for part in saved.parts.values():
                self._know(part)
            expected, found = ("a plain tensor", saved.text) if live is None else differing(live, saved.composition)
            self.differs(str(whole), "value", expected=expected, found=found)
            return True
        if live is not None and saved is None and whole in self.listing.arrays:
            self._know(whole)
            self.differs(str(whole), "value", expected=f"a composite tensor of class {live['class']}", found="a plain tensor")
            return True
        mine = dict(held.attributes).get("stored_as")
        if id_ in self.listing.arrays and mine != (theirs := self.listing.attributes.get(id_, {}).get("stored_as")):
            self.differs(str(id_), "dtype", expected=str(mine or held.spec.dtype), found=str(theirs or held.spec.dtype))
            return True
        return False

    def know(self, wanted: ArrayId) -> None:
        """Records that this rank has a place for the array, and for all that are tied to it on either side."""
        self._know(*self.names.arrays(wanted))

    def _know(self, read: ArrayId, *others: ArrayId) -> None:
        self.arrays.update((read, *others))
        for other in others:
            self.note(f"{other} is not read: it is tied to {read} in this process")

    def of_writer(self, writer: int) -> Mapping[str, Value]:
        """The per-rank values of one writer, read at most once."""
        if writer not in self._read:
            self._read[writer] = self.listing.per_rank(writer)
        return self._read[writer]

    def of_all_writers(self, place: str) -> list[Value]:
        """What the writers that have per-rank values at `place` have there, in order. Reads every writer's."""
        every = (self.of_writer(writer) for writer in range(self.listing.world_size))
        return [values[place] for values in every if place in values]

    def with_contents(self, value: Value) -> Value:
        """The value with the arrays beside it in it, whatever their size. Reads them: for values of ranks of another layout."""

        def leaf(one: object, place: str) -> object:
            if not isinstance(one, ArrayReference):
                return one
            wanted = ArrayId("extra", one.item, one.name, "")
            if wanted not in self.listing.arrays:
                raise LayoutUnsupported(
                    f"value {place}: {wanted} is a composite tensor of one rank, which no other rank can have"
                )
            return replace(array_value(self.listing.read(wanted)), origin=one.origin)

        return mapped(value, "", leaf)

    def agreed_of_ranks(self, place: str) -> tuple[Value, ...]:
        """What this rank has at `place` among its own values, on the layout that saved it; else what all ranks that have
        something there have alike. () where there is no such value."""
        if self.listing.same_layout:
            own = self.of_writer(self.job.rank)
            return (own[place],) if place in own else ()
        saved = self.of_all_writers(place)
        return (saved[0],) if saved and self.is_one(saved) else ()

    def is_one(self, values: Sequence[Value]) -> bool:
        """Whether values of ranks are the same, the contents of the arrays beside them too, which are read if need be."""
        if len(values) == 1:
            return True
        return len({typed_key(self.with_contents(one)) for one in values}) == 1

    def finished(self) -> Binding:
        """The Binding; its `install` does what was added, entry by entry, in order."""
        entries, filled = tuple(self._entries), self.filled.union(held.spec.id for held in self.targets)
        changed = [*self.changed, *(target.tensor for target in self.targets)]
        # a plain tensor changes with the target that shows its memory
        changed += [tensor for many in self.columns for tensor in many.tensors]
        changed += [known.tensor for known in self.identities.alone() if any(held.spec.id in filled for held in known.held)]

        def install() -> None:
            mark_changed(changed)
            install_all(entries)

        return Binding(
            tuple(self.targets),
            tuple(self.mismatches),
            tuple(self.notes),
            frozenset(self.arrays),
            frozenset(self.places),
            install,
            tuple(self.streams),
            tuple(self.ties),
            tuple(self.columns),
        )
