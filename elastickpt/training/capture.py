"""Everything in `state` that this rank contributes to a save."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from elastickpt.errors import StructureConflict
from elastickpt.format.arrays import Mesh
from elastickpt.format.records import Item
from elastickpt.format.values import Value
from elastickpt.training.dtensors import JobView, placed
from elastickpt.training.entries import code_of, elements, entry_name
from elastickpt.training.held import HeldArray, LiveState, Memos
from elastickpt.training.held_trees import PerRank, hold_own, hold_tree, is_stateful
from elastickpt.training.kinds import StateKind, item_of, kinds_of, refuse_zero
from elastickpt.training.modules import hold_module
from elastickpt.training.optimizers import LISTS, HeldOptimizer, StateOptimizers, hold_optimizer, scheduler_state
from elastickpt.training.own_state import PER_RANK, VERSION, OwnEntry, require_taken_back
from elastickpt.training.parameters import Identities
from elastickpt.training.rng import streams
from elastickpt.training.trees import place_of
from elastickpt.training.values import carried


def capture(
    state: Mapping[str, object], *, rank: int, world_size: int, declared: Mesh | None, memos: Memos | None = None
) -> LiveState:
    """What this rank holds of `state`: arrays that share memory with it, and copies of all else.

    Local: no collectives, no I/O, no training code; the state dict methods of objects and `get_extra_state` are called.
    `declared` is the mesh over which plain tensors are replicas; in `memos` it finds what the capture before found out about
    the same tensors. Raises ValueNotCarried with the place of a value that no checkpoint can hold, StructureConflict where
    entries contradict each other, LayoutUnsupported for a placement without a box.
    """
    kinds = kinds_of(state)
    with (memos or Memos()).remembering((rank, world_size, declared, tuple(kinds.items()))) as memo:
        gathering = _Gathering(state, kinds, JobView(rank, world_size, declared, memo))
        gathering.models()
        gathering.values_of_the_user()
        gathering.optimizers()
        gathering.rest()
        if not memo.distinct(gathering.arrays):
            _require_distinct(gathering.arrays)
            memo.put_distinct(gathering.arrays)
    return LiveState(
        tuple(gathering.arrays),
        tuple(gathering.items[key] for key in state),
        tuple(held.table.finished() for held in gathering.held_optimizers.values()),
        gathering.values,
        gathering.per_rank,
        gathering.identities.tied(),
    )


@dataclass(slots=True, eq=False)
class _Gathering:
    """A LiveState while it is being made. Models and values come first, wherever they stand: they name parameters."""

    state: Mapping[str, Any]
    kinds: Mapping[str, StateKind]
    job: JobView
    identities: Identities = field(default_factory=Identities)
    arrays: list[HeldArray] = field(default_factory=list)
    items: dict[str, Item] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    per_rank: dict[str, Value] = field(default_factory=dict)
    held_optimizers: dict[str, HeldOptimizer] = field(default_factory=dict)

    def of_kind(self, *kinds: StateKind) -> Iterable[tuple[str, Any]]:
        return [(key, value) for key, value in self.state.items() if self.kinds[key] in kinds]

    def models(self) -> None:
        for key, model in self.of_kind("model"):
            with taking(key, model):
                held = hold_module(key, model, job=self.job, identities=self.identities)
                self.items[key] = held.item
                self.arrays += held.arrays
                for extra in held.extra_states:
                    self._own(key, extra_state(extra.module), extra.pointer)
                for part in held.parts:
                    require_taken_back(part.entries, part.loaders)
                    self.values |= {place_of(key, VERSION, name): carried(v, name) for name, v in part.loaders.items()}
                    for entry in part.entries:
                        self._own_entry(key, entry)

    def _own_entry(self, key: str, entry: OwnEntry) -> None:
        """One entry of a model's own state dict; nobody says that several ranks have the same. [UCF-141]"""
        place, value = place_of(key, entry.key), entry.value
        if self.job.world_size == 1 or (isinstance(value, torch.Tensor) and placed(value) is not None):
            self.values[place], held = hold_tree(key, value, place=place, job=self.job, identities=self.identities)
            self.arrays += held
        else:
            self._own(key, value, place)
            self.values[place + PER_RANK] = True

    def optimizers(self) -> None:
        entries = dict(self.of_kind("optimizer"))
        beside = StateOptimizers.of(entries)
        for key, entry in entries.items():
            with taking(key, entry):
                for one in elements(entry).values():
                    refuse_zero(key, one)
                held = hold_optimizer(key, entry, job=self.job, identities=self.identities, beside=beside)
            self.items[key] = item_of(key, entry, "optimizer")
            self.held_optimizers[key] = held
            self.arrays += held.arrays
            self.values |= held.values
            self.per_rank |= held.per_rank

    def values_of_the_user(self) -> None:
        """Before the optimizers, whose parameters may stand there."""
        self._all_of("value")

    def _own(self, key: str, value: object, place: str) -> None:
        self.per_rank[place], held = hold_own(key, value, place=place, job=self.job)
        self.arrays += held

    def rest(self) -> None:
        self._all_of("scheduler", "rng", "per-rank", "object")

    def _all_of(self, *kinds: StateKind) -> None:
        for key, value in self.of_kind(*kinds):
            self.items[key] = item_of(key, value, self.kinds[key])
            with taking(key, value):
                self._one(key, value)

    def _one(self, key: str, value: Any) -> None:
        place, kind = place_of(key), self.kinds[key]
        if kind == "rng":
            self.per_rank[place] = streams()
        elif kind == "per-rank":
            self._own(key, own_state(value), place)
        elif kind == "value":
            self._tree(key, value, place)
        else:
            for path, one in elements(value).items():
                refuse_zero(key, one)
                below = place_of(key, *((path,) if path else ()))
                state = self._scheduler(one, below) if kind == "scheduler" else one.state_dict()
                self._tree(key, state, below)

    def _scheduler(self, scheduler: LRScheduler, place: str) -> object:
        state, lists = scheduler_state(scheduler, place=place, optimizers=self.held_optimizers.values())
        if lists:
            self.per_rank[f"{place}/{LISTS}"] = dict(lists)
        return state

    def _tree(self, key: str, tree: object, place: str) -> None:
        self.values[place], held = hold_tree(key, tree, place=place, job=self.job, identities=self.identities)
        self.arrays += held


def taking(key: str, value: object) -> AbstractContextManager[None]:
    """What an entry's own code raises inside is its failure."""
    return code_of(entry_name(key, value), doing="taking its state")


def extra_state(module: nn.Module) -> object:
    """What the module's own `get_extra_state` returns."""
    return module.get_extra_state()


def own_state(value: PerRank) -> object:
    """The state of what `PerRank` wraps."""
    return value.value.state_dict() if is_stateful(value.value) else value.value


def _require_distinct(arrays: Iterable[HeldArray]) -> None:
    ids = [held.spec.id for held in arrays]
    if len({(id_.section, id_.item, id_.name, id_.state) for id_ in ids}) < len(ids):
        twice = next(id_ for id_, count in Counter(ids).items() if count > 1)
        raise StructureConflict(
            f"two tensors of `state` have the one name {twice}: keys of a dict must differ as text, which 1 and '1' do not"
        )
