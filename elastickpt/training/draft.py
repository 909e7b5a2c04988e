"""A Binding while it is being made: what the parts of `bind` add to, and how they look things up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from elastickpt.format.arrays import ArrayId
from elastickpt.format.values import Value
from elastickpt.training.dtensors import Job
from elastickpt.training.entries import Install, code_of, entry_name, install_all
from elastickpt.training.held import HeldArray
from elastickpt.training.identities import Identities
from elastickpt.training.listing import Binding, Difference, Listing, Mismatch, Names
from elastickpt.training.rng import Continuation
from elastickpt.training.versions import mark_changed


@dataclass(slots=True, eq=False)
class Draft:
    """Collects what one rank's Binding will hold. `identities` knows the tensors of all models of `state` already.

    `installs` are the steps of the entry that is being bound; see `entry`.
    """

    listing: Listing
    job: Job
    identities: Identities
    names: Names
    targets: list[HeldArray] = field(default_factory=list)
    ties: list[tuple[HeldArray, ArrayId]] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
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

    def differs(self, name: str, what: Difference, *, expected: str, found: str) -> None:
        """Both have it, and it is not the same."""
        self.mismatches.append(Mismatch(name, what, expected, found, "both"))

    def note(self, text: str) -> None:
        """Something that loading does differently from what one would assume; each text once."""
        if text not in self.notes:
            self.notes.append(text)

    def fill(self, held: HeldArray) -> None:
        """Makes `held` a target, or records why it cannot be one."""
        name, found = str(held.spec.id), self.names.arrays(held.spec.id)
        if not found:
            self.missing(name, f"{held.spec.dtype} {held.spec.shape}")
            return
        self._know(*found)
        spec = self.listing.arrays[found[0]]
        if spec.shape != held.spec.shape:
            self.differs(name, "shape", expected=str(held.spec.shape), found=str(spec.shape))
        elif spec.dtype != held.spec.dtype:
            self.differs(name, "dtype", expected=held.spec.dtype, found=spec.dtype)
        else:
            target = held if spec == held.spec else replace(held, spec=spec)
            self.targets.append(target)
            self.ties += ((target, other) for other in found[1:])

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

    def finished(self) -> Binding:
        """The Binding; its `install` does what was added, entry by entry, in order."""
        entries, filled = tuple(self._entries), frozenset(held.spec.id for held in self.targets)
        changed = [target.tensor for target in self.targets]
        changed += [known.tensor for known in self.identities if any(held.spec.id in filled for held in known.held)]

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
        )
