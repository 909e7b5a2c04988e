"""Optimizers taking a checkpoint's states and groups; the reverse of `optimizers`.

States and groups are filled where they are (`state_binding`, `groups`); `optimizer.step()` is never run. What overrides and
hooks added to the state dict is handed back through the optimizer's own loading (`optimizer_loading`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Number
from typing import Any

from torch.optim import Optimizer

from elastickpt.errors import ValueNotCarried
from elastickpt.format.arrays import ArrayId
from elastickpt.format.tables import TableName
from elastickpt.format.values import Value
from elastickpt.training.alike_states import bind_alike
from elastickpt.training.binder import Binder
from elastickpt.training.composites import Saved
from elastickpt.training.entries import elements, has_own_way, state_dict_of, type_name
from elastickpt.training.groups import bind_groups
from elastickpt.training.optimizer_columns import ENTRIES, PART, PER_RANK
from elastickpt.training.optimizer_entries import ParameterKeys, entry_place
from elastickpt.training.optimizer_loading import containers_copied, load_own, packed
from elastickpt.training.optimizer_parts import OptimizerPart, Prefix, parts_of
from elastickpt.training.optimizer_states import TableView
from elastickpt.training.optimizers import StateOptimizers, entries_of
from elastickpt.training.parameters import OwnedParameter, groups_of, states_of
from elastickpt.training.state_binding import ParameterStates, SavedStates, StoredStates
from elastickpt.training.tree_binding import bind_tree
from elastickpt.training.trees import place_of
from elastickpt.training.values import shown

log = logging.getLogger(__name__)


class BoundOptimizer:
    """An entry with optimizers and the table that the checkpoint has for it (None when it has none)."""

    def __init__(self, binder: Binder, item: str, entry: object, beside: StateOptimizers) -> None:
        self.item = item
        self.entry = entry
        self.parts = parts_of(item, entry, binder.identities, elsewhere=beside.elsewhere(item))
        self.view = next((TableView(table) for table in binder.listing.tables if table.item == item), None)
        self._paths: dict[int, list[str]] = {}  # of a parameter, by id: the parts that have it
        for part in self.parts:
            for number in {id(param.parameter) for param in part.params}:
                self._paths.setdefault(number, []).append(part.path)
        self._binder = binder
        self.owners = sorted((table.item for table in binder.listing.tables), key=len, reverse=True)
        self._composites: dict[TableName, list[tuple[ArrayId, Saved]]] = {}
        for id_, saved in binder.listing.composites.items():
            if id_.section == "params":
                self._composites.setdefault((id_.item, id_.name), []).append((id_, saved))
        keys = () if self.view is None else self.view.keys("hyper")
        prefixed = {path for part in self.parts if (path := part.path) and any(key.startswith(f"{path}.") for key in keys)}
        others = tuple(f"{path}." for path in prefixed)
        self.options = {part.path: Prefix(*_text(part.path, prefixed, others)) for part in self.parts}

    def part_of(self, optimizer: object) -> OptimizerPart | None:
        """The part that an optimizer is, or whose states it gives as its own."""
        return next((part for part in self.parts if optimizer in (part.optimizer, *part.delegates)), None)

    def has_options(self, part: OptimizerPart) -> bool:
        """Whether the options that the checkpoint has for the part's parameters are its own, and no later part's."""
        if not part.own_groups or self.options[part.path].text:
            return part.own_groups
        after = self.parts[self.parts.index(part) + 1 :]
        others = (other for other in after if other.own_groups and not self.options[other.path].text)
        own = {id(param.parameter) for param in part.params}
        return not any(id(param.parameter) in own for other in others for param in other.params)

    @property
    def alone(self) -> frozenset[int]:
        """The ids of parameters that one part has, and no other."""
        return frozenset(number for number, paths in self._paths.items() if len(paths) == 1)

    def saved_name(self, param: OwnedParameter) -> TableName | None:
        """The name, its own or a tied one, under which the checkpoint's table has this parameter."""
        if not self._binder.names.has_other(*param.name):
            return param.name if self.view is not None and self.view.has(param.name) else None
        names = self._binder.names.candidates(*param.name)
        return next((name for name in names if self.view is not None and self.view.has(name)), None)

    def saved_groups(self, part: OptimizerPart) -> list[list[TableName]]:
        """For each live group of a part, the names of its parameters in the checkpoint's table."""
        found: list[list[TableName]] = [[] for _ in groups_of(part.optimizer)]
        for param in part.params:
            if (name := self.saved_name(param)) is not None:
                found[param.group].append(name)
        return found

    def saved_states(self, part: OptimizerPart, param: OwnedParameter, name: TableName) -> SavedStates:
        """What the checkpoint has of a parameter for this part's own states."""
        having = self._paths[id(param.parameter)]
        fields = {} if self.view is None else self.view.of("scalar", name)
        unnamed = fields.get(PART, having[0])
        others = tuple(f"{path}." for path in having if path != unnamed)
        return self._states(name, Prefix("", others) if part.path == unnamed else Prefix(f"{part.path}.")).only(None)

    def saved_in_state_dict(self, name: TableName) -> SavedStates:
        """What the checkpoint has of a parameter for state dicts."""
        return self._states(name, Prefix(""))

    def _states(self, name: TableName, prefix: Prefix) -> SavedStates:
        fields = {} if self.view is None else self.view.of("scalar", name)
        return SavedStates.of(name, prefix, fields, self._stored(name))

    def _stored(self, name: TableName) -> StoredStates:
        """The arrays and composite tensors of a parameter that are states of this entry, and what stands before their names."""
        prefix, arrays = "", {}
        for stored in self._binder.names.states.get(name, ()):
            if self._is_mine(stored):
                arrays[stored.removeprefix(f"{self.item}.")] = ArrayId("params", *name, stored)
                if stored.startswith(f"{self.item}."):
                    prefix = f"{self.item}."
        composites = {
            id_.state.removeprefix(f"{self.item}."): (id_, saved)
            for id_, saved in self._composites.get(name, ())
            if self._is_mine(id_.state)
        }
        return StoredStates(prefix, arrays, composites)

    def _is_mine(self, stored: str) -> bool:
        """Whether a state, by its name in the checkpoint, is one of this entry."""
        owner = next((item for item in self.owners if stored.startswith(f"{item}.")), None)
        return not (stored == "value" or stored.startswith("value.")) and owner in (None, self.item)


def bind_optimizer(binder: Binder, item: str, entry: object, beside: StateOptimizers) -> BoundOptimizer:
    """Binds states, groups and values of one entry. Raises StructureConflict as saving it would."""
    place = place_of(item)
    binder.places.add(place)
    bound = BoundOptimizer(binder, item, entry, beside)
    if bound.view is None:
        count = len({id(param.parameter) for part in bound.parts for param in part.params})
        binder.missing(place, f"the state of {type_name(entry)} over {count} parameters")
        return bound
    saved, now = next((one.type for one in binder.listing.items if one.name == item), ""), type_name(entry)
    if saved not in ("", now):
        binder.note(
            f"{place}: saved by {saved}, now a {now}, which gets the states of the other: it may know them by other names"
        )
    for part in bound.parts:
        _bind_part(binder, bound, part)
    for path, root in elements(entry).items():
        if has_own_way(root):
            _ByItself(binder, bound, path, root).bind()
    return bound


def _text(path: str, prefixed: set[str], others: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    return (f"{path}.", ()) if path in prefixed else ("", others)


def _bind_part(binder: Binder, bound: BoundOptimizer, part: OptimizerPart) -> None:
    place, groups = place_of(bound.item), groups_of(part.optimizer)
    assert bound.view is not None
    for param in bind_alike(binder, bound.view, part, alone=bound.alone, items=bound.owners):
        name = bound.saved_name(param)
        if name is None:
            binder.missing(place + place_of("state", *param.name), "a parameter of this optimizer")
        else:
            saved = bound.saved_states(part, param, name)
            ParameterStates(binder, bound.item, param, saved, states_of(part.optimizer), groups[param.group]).bind()
    if isinstance(part.optimizer, Optimizer):
        binder.installs.append(partial(_with_own_numbers, part.optimizer))
    if bound.has_options(part):
        pairs = zip(groups, bound.saved_groups(part), strict=True)
        bind_groups(binder, bound.item, bound.view, pairs, part.path, bound.options[part.path])
    _bind_values(binder, bound, part)


def _with_own_numbers(optimizer: Optimizer) -> None:
    """Plain numbers among the states become what the optimizer makes of those that it loads: torch's own count their steps by
    tensors, and take the numbers of files from before torch 1.12 so."""
    plain = any(
        isinstance(one, Number) and not isinstance(one, bool)
        for states in states_of(optimizer).values()
        if isinstance(states, dict)
        for one in states.values()
    )
    if plain and type(optimizer).__setstate__ is not Optimizer.__setstate__:
        optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def _bind_values(binder: Binder, bound: BoundOptimizer, part: OptimizerPart) -> None:
    """State that belongs to no parameter."""
    item, states = bound.item, states_of(part.optimizer)
    others = tuple(f"{other.path}." for other in bound.parts[1:])
    prefix = Prefix("", others) if part is bound.parts[0] else Prefix(f"{part.path}.")
    below = place_of(item, "state") + "/"
    saved = {
        place: key
        for place in binder.listing.values
        if place.startswith(below)
        and (key := prefix.strip(place[len(below) :].replace("~1", "/").replace("~0", "~"))) is not None
        and not _is_entry(binder, item, place)
    }
    live = {place_of(item, "state", prefix.text + key): key for key in states if isinstance(key, str)}
    for place, key in live.items():
        if place not in saved:
            binder.missing(place, shown(states[key]))
    for place, key in saved.items():
        binder.places.add(place)
        tree = bind_tree(binder, item, binder.listing.values[place], place=place, live=states.get(key))
        binder.installs.append(lambda key=key, tree=tree: states.__setitem__(key, tree))  # type: ignore[misc]


def _is_entry(binder: Binder, item: str, place: str) -> bool:
    return place.removesuffix(PER_RANK) in (saved_entries(binder, item) or {})


def saved_entries(binder: Binder, item: str) -> Mapping[str, Any] | None:
    """The place of each entry of the item's state dicts to its path, from all ranks that say so; None if nobody does."""
    at = place_of(item, ENTRIES)
    if at in binder.listing.values:
        every: Sequence[Value] = [binder.listing.values[at]]
    elif binder.listing.same_layout:
        own = binder.of_writer(binder.job.rank)
        every = [own[at]] if at in own else []
    else:
        every = binder.of_all_writers(at)
    found: dict[str, Any] = {}
    for one in every:
        found.update(one if isinstance(one, dict) else {})
    return found if every else None


class _ByItself:
    """One optimizer with an override or hooks: the entries of its state dict, and its own loading."""

    def __init__(self, binder: Binder, bound: BoundOptimizer, path: str, root: Optimizer) -> None:
        self._binder = binder
        self._bound = bound
        self._path = path
        self._root = root
        self._parts = [part for part in bound.parts if part.root_path == path]
        self._at: list[tuple[list[Any], object]] = []
        self._made: list[tuple[dict[str, Any], OptimizerPart, dict[Any, Any]]] = []
        self._complete = False

    def bind(self) -> None:
        """Binds the entries, and adds the optimizer's own loading to what is done once all is filled."""
        saved = saved_entries(self._binder, self._bound.item)
        self._binder.places.add(place_of(self._bound.item, ENTRIES))
        self._complete = saved is not None
        live = state_dict_of(self._bound.item, self._root)
        for place, whereabouts in (saved or {}).items():
            self._entry(str(place), whereabouts, live)
        if saved is None:
            self._report(live)
        for part in self._parts:
            self._of_parameters(part)
        self._binder.installs.append(self._load)

    def _entry(self, place: str, whereabouts: Any, live: object) -> None:
        root_path, *path = whereabouts
        if root_path != self._path:
            return
        shared = self._binder.listing.values
        if f"{place}{PER_RANK}" in shared:
            self._binder.places.add(f"{place}{PER_RANK}")
            agreed = self._binder.agreed_of_ranks(place)
        else:
            self._binder.places.add(place)
            agreed = (shared[place],)
        if not agreed:
            expected = f"the entry of {type(self._root).__name__} that this rank had, or that all ranks had alike"
            self._binder.differs(place, "value", expected=expected, found="others on other ranks, on another layout")
            return
        tree = bind_tree(self._binder, self._bound.item, agreed[0], place=place, live=_at(live, path))
        self._at.append((path, tree))

    def _report(self, live: object) -> None:
        """A checkpoint of a release that did not look at state dicts has none of the entries that there are now."""
        rest = entries_of(self._bound.item, self._path, self._bound.parts, live, self._binder.identities)
        for path, entry in rest.at.items():
            self._binder.missing(entry_place(self._bound.item, self._path, path), shown(entry))
        for one in rest.of_parameters:
            self._binder.missing(place_of(self._bound.item, "state", *one.param.name, one.name), shown(one.entry))

    def _of_parameters(self, part: OptimizerPart) -> None:
        """Makes what the state dict has of parameters; the tensors that it has now are not the object's to keep."""
        stores: dict[str, tuple[dict[str, Any], dict[Any, Any]]] = {}
        for param in part.params:
            name = self._bound.saved_name(param)
            saved = None if name is None else self._bound.saved_in_state_dict(name)
            for whereabouts in () if saved is None else saved.all_whereabouts.values():
                if not isinstance(whereabouts, dict) or whereabouts["part"] != part.path:
                    continue
                _, store = stores.setdefault(repr(whereabouts), (whereabouts, {}))
                if param.parameter not in store and saved is not None:
                    store[param.parameter] = {}
                    group = groups_of(part.optimizer)[param.group]
                    ParameterStates(self._binder, self._bound.item, param, saved.only(whereabouts), store, group).create({})
        self._made.extend((whereabouts, part, store) for whereabouts, store in stores.values())

    def _load(self) -> None:
        """Builds the state dict of the filled optimizer with the checkpoint's entries, and lets the optimizer load it."""
        state_dict = self._filled()
        if self._complete:
            rest = entries_of(self._bound.item, self._path, self._bound.parts, state_dict, self._binder.identities)
            for where in rest.at:
                _remove(state_dict, where)
            for one in rest.of_parameters:
                _remove(state_dict, (*one.path, one.key, *(() if one.state is None else (one.state,))))
        for path, entry in self._at:
            state_dict = _put(state_dict, path, entry)
        for whereabouts, part, store in self._made:
            keys = ParameterKeys.of(part).keys[whereabouts["by"]]
            for key, param in zip(keys, part.params, strict=True):
                for entry in store.get(param.parameter, {}).values():
                    at = param.parameter if whereabouts["by"] == "parameter" else key
                    last = () if whereabouts["state"] is None else (whereabouts["state"],)
                    state_dict = _put(state_dict, (*whereabouts["path"], at, *last), entry)
        load_own(self._bound.item, self._root, self._parts, state_dict)

    def _filled(self) -> Any:
        """The state dict of the optimizer now that states and groups are filled and the entries are not.

        Where its override does not get along with that, it is of torch's form.
        """
        try:
            return containers_copied(state_dict_of(self._bound.item, self._root))
        except ValueNotCarried:
            raise
        except Exception as error:  # of code that is not ours
            log.info("%s: state_dict of %s on what is filled: %r", self._bound.item, type(self._root).__name__, error)
            return packed(self._root)


def _at(tree: Any, path: Sequence[Any]) -> object:
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _remove(tree: Any, path: Sequence[Any]) -> None:
    """What stands at a path below dicts; elements of lists stay."""
    above = _at(tree, path[:-1])
    if path and isinstance(above, dict):
        above.pop(path[-1], None)


def _put(tree: Any, path: Sequence[Any], entry: Any) -> Any:
    """The tree with `entry` at the path; dicts that lead there are made."""
    if not path:
        return entry
    key, *rest = path
    if isinstance(tree, dict):
        tree[key] = _put(tree.get(key, {}), rest, entry)
    elif isinstance(tree, list) and isinstance(key, int):
        tree.extend([None] * (key + 1 - len(tree)))
        tree[key] = _put(tree[key], rest, entry)
    elif isinstance(tree, tuple) and isinstance(key, int):
        made = _put(list(tree), path, entry)
        return tuple(made)
    else:
        return _put({}, path, entry)
    return tree
