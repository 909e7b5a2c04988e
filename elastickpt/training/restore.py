"""How this process's `state` takes what a checkpoint has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from elastickpt.format.arrays import Mesh
from elastickpt.format.encode_values import typed_key
from elastickpt.format.values import Value
from elastickpt.training.binder import Binder
from elastickpt.training.dtensors import JobView
from elastickpt.training.entries import elements
from elastickpt.training.held import HeldArray
from elastickpt.training.held_trees import PerRank, Reshardable, in_memory, is_stateful
from elastickpt.training.kinds import StateKind, kinds_of, refuse_zero
from elastickpt.training.listing import Binding, Listing, SavedNames
from elastickpt.training.modules import HeldModule, hold_module
from elastickpt.training.optimizer_binding import BoundOptimizer, bind_optimizer
from elastickpt.training.optimizers import StateOptimizers
from elastickpt.training.own_loading import bind_model
from elastickpt.training.parameters import Identities
from elastickpt.training.rng import continued, rederived
from elastickpt.training.scheduler_binding import bind_scheduler
from elastickpt.training.tree_binding import bind_container, bind_object, bind_tree
from elastickpt.training.values import carried, place_of, revived, shown


@dataclass(frozen=True, slots=True, eq=False)
class HeldModels:
    """What the models of a `state` hold on this rank, from which the rest of it follows: `identities` knows their tensors."""

    state: Mapping[str, object]
    kinds: Mapping[str, StateKind]
    job: JobView
    identities: Identities
    models: tuple[HeldModule, ...]

    @property
    def arrays(self) -> list[HeldArray]:
        """Those of all models: the layout of a job is that of its parameters."""
        return [held for model in self.models for held in model.arrays]


def hold_models(state: Mapping[str, object], *, rank: int, world_size: int, declared: Mesh | None) -> HeldModels:
    """What the models of `state` hold on this rank; raises what `capture` would. Local, no I/O. For one `bind`."""
    job, kinds, identities = JobView(rank, world_size, declared), kinds_of(state), Identities()
    models = [hold_module(key, value, job=job, identities=identities) for key, value in state.items() if kinds[key] == "model"]
    return HeldModels(state, kinds, job, identities, tuple(models))


def bind(held: HeldModels, listing: Listing) -> Binding:
    """How this rank's part of a state is filled from the checkpoint that `listing` describes. Changes nothing in it.

    Local: no collectives; the only I/O is `listing.per_rank`, for entries that need it. Objects' `state_dict` (and
    `reshard`, see `PerRank`) are called. New tensors for states that do not exist yet are allocated here, and attached
    by `install()`. Differences are in the Binding; what `capture` would refuse is refused here too, with the same
    errors.
    """
    state, kinds, identities = held.state, held.kinds, held.identities
    binder = Binder(listing, held.job, identities, SavedNames(listing, identities.tied()))
    for model in held.models:
        with binder.entry(model.item.name, state[model.item.name]):
            bind_model(binder, model)
    optimizers: list[BoundOptimizer] = []
    beside = StateOptimizers.of(dict(_of_kinds(state, kinds, "optimizer")))
    ways_to_bind: Mapping[StateKind, Callable[[str, Any], object]] = {  # in this order
        "value": lambda key, value: _bind_value(binder, state, key, value),
        "optimizer": lambda key, value: optimizers.append(bind_optimizer(binder, key, value, beside)),
        "scheduler": lambda key, value: _each(
            binder, key, value, lambda one, place: bind_scheduler(binder, key, one, place=place, optimizers=optimizers)
        ),
        "object": lambda key, value: _each(binder, key, value, lambda one, place: bind_object(binder, key, one, place=place)),
        "per-rank": lambda key, value: _bind_per_rank(binder, key, value),
        "rng": lambda key, value: _bind_streams(binder, key),  # last: what the others do in install() may draw numbers
    }
    for kind, bind_one in ways_to_bind.items():
        for key, value in _of_kinds(state, kinds, kind):
            with binder.entry(key, value):
                bind_one(key, value)
    return binder.finished()


def _of_kinds(state: Mapping[str, Any], kinds: Mapping[str, StateKind], kind: StateKind) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in state.items() if kinds[key] == kind]


def _each(binder: Binder, key: str, value: object, bind_one: Callable[[Any, str], None]) -> None:
    """Binds the objects of an entry, one or several, at their places."""
    binder.places.add(place_of(key))
    for path, one in elements(value).items():
        refuse_zero(key, one)
        bind_one(one, place_of(key, *((path,) if path else ())))


def _bind_value(binder: Binder, state: Mapping[str, object], key: str, live: object) -> None:
    place = place_of(key)
    binder.places.add(place)
    if place not in binder.listing.values:
        binder.missing(place, shown(live))
        return
    found = binder.listing.values[place]
    if isinstance(state, MutableMapping):
        bind_container(binder, key, live, found=found, put=lambda new: state.__setitem__(key, new))
        return

    def put(new: object) -> None:
        """Nothing to do: it was found equal."""

    if isinstance(live, (int, float, str, bytes, tuple, type(None))) and typed_key(carried(live, place)) != typed_key(found):
        expected = f"{shown(live)} to be replaceable: `state` is a {type(state).__name__}, which cannot be changed"
        binder.differs(place, "value", expected=expected, found=shown(found))
        return
    bind_container(binder, key, live, found=found, put=put)


def _bind_per_rank(binder: Binder, key: str, live: PerRank) -> None:
    place = place_of(key)
    binder.places.add(place)
    if binder.listing.same_layout:
        own = binder.of_writer(binder.job.rank)
        if place not in own:
            binder.missing(place, f"this rank's own {type(live.value).__name__}")
            return
        found = own[place]
    elif isinstance(live.value, Reshardable):
        states = [revived(binder.with_contents(value)) for value in binder.of_all_writers(place)]
        if not states:
            binder.missing(place, f"the {type(live.value).__name__} of any rank")
            return
        found = in_memory(live.value.reshard(states, binder.job.rank, binder.job.world_size), place)
    else:
        binder.differs(
            place,
            "value",
            expected=f"the layout that saved it ({binder.listing.world_size} ranks), or a {type(live.value).__name__} "
            f"with a method reshard(states, rank, world_size)",
            found=f"a value of its own for each of {binder.listing.world_size} ranks, loaded on {binder.job.world_size}",
        )
        return
    _settle_per_rank(binder, key, live, found)


def _settle_per_rank(binder: Binder, key: str, live: PerRank, found: Value) -> None:
    value = live.value
    if is_stateful(value):
        tree = bind_tree(binder, key, found, place=place_of(key), live=None)
        load: Callable[[Any], Any] = value.load_state_dict
        binder.installs.append(lambda: load(tree))
    else:
        bind_container(binder, key, value, found=found, put=lambda new: setattr(live, "value", new))


def _bind_streams(binder: Binder, key: str) -> None:
    place = place_of(key)
    binder.places.add(place)
    if binder.listing.same_layout:
        own = binder.of_writer(binder.job.rank)
        saved = [own[place]] if place in own else []
    else:
        saved = binder.of_all_writers(place)
    if not saved:
        binder.missing(place, "random streams")
        return
    step, rank, ranks = binder.listing.step, binder.job.rank, binder.listing.ranks
    going_on = continued(saved[0]) if binder.listing.same_layout else rederived(saved, step=step, rank=rank, ranks=ranks)
    for note in going_on.notes:
        binder.note(f"{place}: {note}")
    binder.installs.append(going_on.install)
    binder.streams.append(going_on)
