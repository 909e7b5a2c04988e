"""What an optimizer's own state dict has beyond the states and groups of its parts.

    state_dict()["state"][3]["ema"]        (by the place of a parameter)  -> state `ema` of that parameter
    state_dict()["slow"][(0, 3)]           (by group and place)           -> state `slow` of that parameter
    state_dict()["averager"]["step"]                                      -> entry, at its path
    state_dict()["state"][3]["exp_avg"]    (memory of a part's state)     -> nothing: it is carried already
    state_dict()["state"][3]["unpacked"]   (changes with a part's state)  -> nothing: loading the state brings it back

Where an entry goes by parameters is told by the keys, and by shapes: a tensor there has its parameter's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from elastickpt.errors import ValueNotCarried
from elastickpt.format.encode_values import values_equal
from elastickpt.format.values import Value
from elastickpt.training.known_memory import CarriedTensors, DerivedEntries, KnownMemory, Path, tensors_in
from elastickpt.training.optimizer_parts import NO_OPTION, OptimizerPart
from elastickpt.training.parameters import OwnedParameter, groups_of, states_of
from elastickpt.training.values import carried, place_of

By = Literal["place", "group and place", "parameter"]


@dataclass(frozen=True, slots=True, eq=False)
class ByParameter:
    """An entry of one parameter: `entry` stands in the state dict at `path`, then `key`, then `state` (None: at `key`).

    `name` is what the checkpoint calls the state.
    """

    path: Path
    by: By
    part: str
    param: OwnedParameter
    key: Any
    state: str | None
    name: str
    entry: object

    @property
    def whereabouts(self) -> Value:
        """All that is needed to put it there again for another parameter."""
        return {"path": list(self.path), "by": self.by, "part": self.part, "state": self.state}


@dataclass(slots=True, eq=False)
class Beyond:
    """What a state dict has that its optimizer's states and groups do not: `at` paths, and of parameters."""

    at: dict[Path, object] = field(default_factory=dict)
    of_parameters: list[ByParameter] = field(default_factory=list)


def beyond(
    item: str, parts: Sequence[OptimizerPart], state_dict: object, *, carried: CarriedTensors, computed: DerivedEntries
) -> Beyond:
    """What `state_dict`, that of one root, has beyond its `parts`. `carried` is the memory of all that is carried already.

    Raises ValueNotCarried for an entry under the name of a part's state with other contents that do not follow from it.
    """
    walk = _Walk(item, parts, carried, computed)
    walk.root(state_dict)
    return walk.found


class _Walk:
    """One walk over one state dict."""

    def __init__(self, item: str, parts: Sequence[OptimizerPart], carried: CarriedTensors, computed: DerivedEntries) -> None:
        self.found = Beyond()
        self._item = item
        self._parts = parts
        self._carried = carried
        self._computed = computed
        self._keys = {part: ParameterKeys.of(part) for part in parts}
        self._left = list(parts)  # in which a state dict of torch's form has not been found yet

    def root(self, node: object) -> None:
        """Records what of the whole state dict is beyond."""
        if isinstance(node, dict) and (part := self._part_of(node) or self._outermost(node)) is not None:
            self._standard(node, (), part)
        elif isinstance(node, dict):
            for key, one in node.items():
                self.node(one, (key,))
        else:
            self.node(node, ())

    def _outermost(self, node: dict[Any, Any]) -> OptimizerPart | None:
        """The optimizer itself, if the state dict is of torch's form and over its parameters, whatever was added to it."""
        states, groups, part = node.get("state"), node.get("param_groups"), self._parts[0]
        if not isinstance(states, dict) or not isinstance(groups, list) or states_of(part.optimizer):
            return None
        fits = self._keys[part].packed == [_params(group) for group in groups]
        return part if fits and not states else None

    def node(self, node: object, path: Path) -> None:
        """Records what of the tree at `path` is beyond: whole, where nothing in it is carried already."""
        if self._whole(node):
            self.found.at[path] = node
        elif isinstance(node, dict):
            if (part := self._part_of(node)) is not None:
                self._standard(node, path, part)
            elif (goes := self._by_parameter(node)) is not None:
                self._entries(node, path, *goes)
            else:
                for key, one in node.items():
                    self.node(one, (*path, key))
        elif isinstance(node, (list, tuple)):
            for index, one in enumerate(node):
                self.node(one, (*path, index))

    def _whole(self, node: object) -> bool:
        """Whether there is nothing in `node` that another place of the checkpoint has, or that goes by parameters."""
        if isinstance(node, torch.Tensor):
            return not self._carried.has(node)
        if isinstance(node, dict):
            if self._part_of(node) is not None or self._by_parameter(node) is not None:
                return False
            return all(map(self._whole, node.values()))
        return not isinstance(node, (list, tuple)) or all(map(self._whole, node))

    # -- state dicts as torch's optimizers have them -------------------------------------------------------------------

    def _part_of(self, node: dict[Any, Any]) -> OptimizerPart | None:
        """The part whose states and groups these are; told by what they hold, and where they hold nothing by options."""
        states, groups = node.get("state"), node.get("param_groups")
        if not isinstance(states, dict) or not isinstance(groups, list):
            return None
        packed = [_params(group) for group in groups]
        fitting = [part for part in self._parts if self._keys[part].packed == packed]
        for part in fitting:
            if any(self._mine(part, key, entry) for key, entry in states.items()):
                return part
        for part in (*(one for one in self._left if one in fitting), *fitting):
            if all(_same_options(one, other) for one, other in zip(groups, groups_of(part.optimizer), strict=True)):
                return part
        for part in fitting:
            if _shaped(self._keys[part].places["place"], states):
                return part
        return None

    def _mine(self, part: OptimizerPart, key: object, entry: object) -> bool:
        param = self._keys[part].places["place"].get(key)
        if param is None or not isinstance(entry, dict):
            return False
        own = {id(tensor) for tensor in tensors_in(states_of(part.optimizer).get(param.parameter, {}))}
        return any(id(tensor) in own for tensor in tensors_in(entry))

    def _standard(self, node: dict[Any, Any], path: Path, part: OptimizerPart) -> None:
        if part in self._left:
            self._left.remove(part)
        for key, one in node.items():
            if key == "state":
                self._states(one, (*path, key), part)
            elif key == "param_groups":
                for index, group in enumerate(one):
                    live = groups_of(part.optimizer)[index]
                    for option, value in group.items():
                        if option not in NO_OPTION and not (option in live and _same(value, live[option])):
                            self.found.at[*path, key, index, option] = value
            else:
                self.node(one, (*path, key))

    def _states(self, node: dict[Any, Any], path: Path, part: OptimizerPart) -> None:
        params, own = self._keys[part].places["place"], states_of(part.optimizer)
        for key, entry in node.items():
            param = params.get(key)
            if param is None or not isinstance(entry, dict):
                if not (key in own and _same(entry, own[key])):
                    self.node(entry, (*path, key))
                continue
            self._of_member(entry, path, "place", part, param, key)

    def _of_member(
        self, entries: dict[Any, Any], path: Path, by: By, part: OptimizerPart, param: OwnedParameter, key: object
    ) -> None:
        own = states_of(part.optimizer).get(param.parameter, {})
        for state, entry in entries.items():
            if (state in own and _same(entry, own[state])) or self._is_carried(entry):
                continue
            if own and self._computed(path, key, state, entry, part, param):
                continue
            if state in own and path == ("state",):
                raise ValueNotCarried(
                    f"optimizer {self._item!r}: state_dict of {type(part.root).__name__} has {state!r} of "
                    f"{'/'.join(param.name)} with contents that are not those of its state and do not follow from it; "
                    f"give it another name there"
                )
            name = _name(path, state)
            self.found.of_parameters.append(ByParameter(path, by, part.path, param, key, state, name, entry))

    # -- other entries that go by parameters ---------------------------------------------------------------------------

    def _by_parameter(self, node: dict[Any, Any]) -> tuple[By, OptimizerPart] | None:
        """How a dict goes by the parameters of a part, if it does."""
        if not node:
            return None
        for part in self._parts:
            for by in _BY:
                places = self._keys[part].places[by]
                if all(key in places for key in map(_hashable, node)) and (by == "parameter" or _shaped(places, node)):
                    return by, part
        return None

    def _entries(self, node: dict[Any, Any], path: Path, by: By, part: OptimizerPart) -> None:
        places = self._keys[part].places[by]
        for key, entry in node.items():
            param = places[_hashable(key)]
            if isinstance(entry, dict):
                self._of_member(entry, path, by, part, param, key)
            elif not self._is_carried(entry):
                name = _name(path, None)
                self.found.of_parameters.append(ByParameter(path, by, part.path, param, key, None, name, entry))

    def _is_carried(self, entry: object) -> bool:
        found = list(tensors_in(entry))
        return bool(found) and all(map(self._carried.has, found))


_BY: tuple[By, ...] = ("parameter", "place", "group and place")


@dataclass(frozen=True, slots=True, eq=False)
class ParameterKeys:
    """The keys with which state dicts tell the parameters of a part apart: `keys` in its order, `places` back from them.

    `packed` are the places group by group, as torch's state dict has them. A parameter itself stands by its identity.
    """

    keys: Mapping[By, Sequence[object]]
    places: Mapping[By, Mapping[object, OwnedParameter]]
    packed: Sequence[Sequence[int]]

    @classmethod
    def of(cls, part: OptimizerPart) -> ParameterKeys:
        """Those of the parameters that the part has now."""
        first: dict[int, int] = {}
        packed: list[list[int]] = []
        pairs: list[tuple[int, int]] = []
        for index, group in enumerate(groups_of(part.optimizer)):
            packed.append([])
            for place, parameter in enumerate(group["params"]):
                packed[-1].append(first.setdefault(id(parameter), len(pairs)))
                pairs.append((index, place))
        keys: dict[By, Sequence[object]] = {
            "place": [place for places in packed for place in places],
            "group and place": pairs,
            "parameter": [_hashable(param.parameter) for param in part.params],
        }
        places = {by: dict(zip(each, part.params, strict=True)) for by, each in keys.items()}
        return cls(keys, places, packed)


def _hashable(key: object) -> object:
    return ("id", id(key)) if isinstance(key, torch.Tensor) else key


def _params(group: object) -> object:
    return group.get("params") if isinstance(group, dict) else None


def _same_options(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    mine, theirs = ({key: value for key, value in each.items() if key not in NO_OPTION} for each in (one, other))
    return mine.keys() == theirs.keys() and all(_same(value, theirs[key]) for key, value in mine.items())


def _same(one: object, other: object) -> bool:
    """Whether an entry is what a part has under that name."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and KnownMemory((other,)).covers(one)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return values_equal(carried(one, ""), carried(other, ""))
    except ValueNotCarried:
        return False


def _shaped(places: Mapping[object, OwnedParameter], node: Mapping[Any, Any]) -> bool:
    """Whether entries with these keys hold tensors with their parameters' shapes: each one that holds any with axes."""
    some = False
    for key, entry in node.items():
        param = places.get(_hashable(key))
        if param is None:
            return False
        with_axes = [tuple(tensor.shape) for tensor in tensors_in(entry) if tensor.ndim]
        if with_axes and not any(shape in _shapes(param) for shape in with_axes):
            return False
        some = some or bool(with_axes)
    return some


def _shapes(param: OwnedParameter) -> tuple[tuple[int, ...], ...]:
    whole = tuple(param.parameter.shape)
    return (whole,) if param.lying is None else (whole, param.lying.shape, param.lying.box.shape)


def _name(path: Path, state: object) -> str:
    """What a state is called: its path, without torch's own level `state`, and its key."""
    tokens = (*(path[:-1] if path and path[-1] == "state" else path), *(() if state is None else (state,)))
    return ".".join(str(token) for token in tokens)


def entry_place(item: str, root_path: str, path: Path) -> str:
    """The place of an entry of a root's state dict."""
    return place_of(item, *((root_path,) if root_path else ()), *path)
