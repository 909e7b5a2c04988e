"""An optimizer's own loading, after its states and groups were filled in place: for overrides and hooks, and entries beyond.

    state_dict()        as the filled optimizer gives it, with the checkpoint's entries at their paths
    load_state_dict()   the object's own, with its hooks
    then                states have the checkpoint's bits again, in the tensors that were filled

The last is needed as torch's `load_state_dict` casts states to the element type of their parameter, and what a class
unpacks and packs again may lose bits. Dicts and lists that others refer to stay the objects that they were. What a hook
changes after loading, or in a state dict before it, stays changed, and so do the options of groups.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from elastickpt.training.entries import OPTIMIZER_HOOKS, collectives_refused, hooks_there
from elastickpt.training.known_memory import spans_of
from elastickpt.training.optimizer_parts import OptimizerPart
from elastickpt.training.parameters import groups_of, states_of

_PRE, _POST = OPTIMIZER_HOOKS[2:]


def packed(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict that torch's own method makes of an optimizer's states and groups, without hooks."""
    places: dict[int, int] = {}
    groups = []
    for group in groups_of(optimizer):
        for parameter in group["params"]:
            places.setdefault(id(parameter), len(places))
        params = [places[id(parameter)] for parameter in group["params"]]
        groups.append({**group, "params": params})
    states = states_of(optimizer).items()
    state = {places[id(key)] if isinstance(key, torch.Tensor) else key: containers_copied(one) for key, one in states}
    return {"state": state, "param_groups": groups}


def containers_copied(value: Any) -> Any:
    """A copy in which dicts, lists and tuples are new, and all else is the same."""
    if isinstance(value, dict):
        made: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
        made.update((key, containers_copied(one)) for key, one in value.items())
        return made
    if type(value) in (list, tuple):
        return type(value)(containers_copied(one) for one in value)
    return value


def load_own(item: str, root: Optimizer, parts: Sequence[OptimizerPart], state_dict: Any) -> None:
    """Gives `state_dict` to the optimizer's own `load_state_dict`; `parts` are the root's and hold the right states."""
    optimizers = list(dict.fromkeys(one for part in parts for one in (part.optimizer, *part.delegates)))
    held = [_Held.of(one) for one in optimizers]
    with collectives_refused(f"load_state_dict of optimizer {item!r} ({type(root).__name__})"):
        with hooks_there(root), _hooks_watched(root) as watched:
            root.load_state_dict(state_dict)
        for one in held:
            one.put_back(watched.changed)
        for hook in watched.late:
            hook(root)


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """The states and groups of an optimizer, as the objects that they were."""

    optimizer: Optimizer
    states: dict[Any, Any]
    of_keys: dict[Any, Any]
    groups: list[dict[str, Any]]
    options: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, optimizer: Optimizer) -> _Held:
        states, groups = states_of(optimizer), groups_of(optimizer)
        of_keys = {key: dict(value) if isinstance(value, dict) else value for key, value in states.items()}
        return cls(optimizer, states, of_keys, groups, tuple(groups))

    def put_back(self, changed: frozenset[tuple[int, object]]) -> None:
        """The same objects again, with the states that they had; `changed` are states, by id of their parameter, that a hook
        has changed on purpose."""
        self._put_states(states_of(self.optimizer), changed)
        self._put_groups(groups_of(self.optimizer))

    def _put_states(self, now: dict[Any, Any], changed: frozenset[tuple[int, object]]) -> None:
        made = dict(now)
        for key in now:  # what loading left under a key that saving would refuse, such as the id of an old parameter
            if not isinstance(key, (torch.Tensor, str)) and key not in self.of_keys:
                del made[key]
        for key, had in self.of_keys.items():
            new = now.get(key)
            if not isinstance(had, dict) or not isinstance(key, torch.Tensor):
                made[key] = had
                continue
            states = dict(new) if isinstance(new, dict) else {}
            for state, value in had.items():
                if (id(key), state) not in changed:
                    states[state] = _bits_of(value, states.get(state))
            made[key] = states
        for key, value in made.items():
            old = self.states.get(key)
            if isinstance(old, dict) and isinstance(value, dict) and old is not value:
                old.clear()
                old.update(value)
                made[key] = old
        if self.states is not now:
            _set(self.optimizer, "state", self.states)
        self.states.clear()
        self.states.update(made)

    def _put_groups(self, now: list[dict[str, Any]]) -> None:
        if len(now) != len(self.options):
            return
        for old, new in zip(self.options, list(now), strict=True):
            if old is not new:
                params = old["params"]
                made = {key: _in_place(old.get(key), value) for key, value in new.items()}
                old.clear()
                old.update(made, params=params)
        if self.groups is not now:
            _set(self.optimizer, "param_groups", self.groups)
        self.groups[:] = self.options


def _set(optimizer: Optimizer, name: str, value: object) -> None:
    if name in vars(optimizer):  # else it is a property of a class that delegates
        setattr(optimizer, name, value)


def _bits_of(had: object, new: object) -> object:
    """What a state is after loading: the tensor that was filled, or a view that loading has made of memory of its own."""
    if not isinstance(had, torch.Tensor) or not isinstance(new, torch.Tensor) or new is had:
        return had
    alike = (new.shape, new.dtype, new.device, type(new)) == (had.shape, had.dtype, had.device, type(had))
    if not alike or type(new) is not torch.Tensor or new.untyped_storage().nbytes() <= new.numel() * new.element_size():
        return had
    if spans_of(new) != spans_of(had):
        with torch.no_grad():
            new.detach().copy_(had)
    return new


def _in_place(old: object, new: object) -> object:
    """An option of a group: a tensor stays the object that it was."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor) or old is new:
        return new
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    with torch.no_grad():
        old.detach().copy_(new)
    return old


@dataclass(slots=True, eq=False)
class _Watched:
    """What hooks did or are still to do: states, by id of their parameter, that a pre-hook changed; post-hooks reached."""

    changed: frozenset[tuple[int, object]]
    late: tuple[Callable[[Optimizer], object], ...]


@contextmanager
def _hooks_watched(optimizer: Optimizer) -> Iterator[_Watched]:
    """Inside, the optimizer's pre-hooks run where torch runs them; its post-hooks are noted, to be run afterwards."""
    watched = _Watched(frozenset(), ())
    kept = {name: vars(optimizer)[name] for name in (_PRE, _POST) if vars(optimizer).get(name)}

    def before(one: Optimizer, state_dict: Any) -> Any:
        given = containers_copied(state_dict)
        for hook in kept[_PRE].values():
            result = hook(one, state_dict)
            state_dict = state_dict if result is None else result
        watched.changed = _changed(one, given, state_dict)
        return state_dict

    def after(one: Optimizer) -> None:
        watched.late = tuple(kept[_POST].values())

    for name, watcher in ((_PRE, before), (_POST, after)):
        if name in kept:
            setattr(optimizer, name, OrderedDict({0: watcher}))
    try:
        yield watched
    finally:
        for name, hooks in kept.items():
            setattr(optimizer, name, hooks)


def _changed(optimizer: Optimizer, before: Any, after: Any) -> frozenset[tuple[int, object]]:
    """The states at whose places a hook has put something else, or nothing."""
    found: set[tuple[int, object]] = set()
    parameters = [parameter for group in groups_of(optimizer) for parameter in group["params"]]
    old, new = before.get("state", {}), after.get("state", {})
    for place, parameter in enumerate(parameters):
        mine, theirs = old.get(place, {}), new.get(place, {})
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found.update((id(parameter), key) for key in mine if mine[key] is not theirs.get(key))
    return frozenset(found)
