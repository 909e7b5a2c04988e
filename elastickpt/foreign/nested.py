"""What a saved value consists of: models, optimizers, other tensors and plain values, told apart by their form. [FOR-30..36]

A mapping with `state` and `param_groups` is an optimizer, as torch writes it. A mapping of nothing but tensors is a model, and
so are tensors at the top where no mapping is one. The path to a mapping, with dots, is its item; at the top the items are
called "model" and "optimizer".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from elastickpt.errors import Malformed, ValueNotCarried
from elastickpt.foreign.listing import (
    FilePiece,
    LocalName,
    NotCarried,
    ParamGroup,
    StateScalar,
    StoredTensor,
    TiedName,
    WholeTensor,
)
from elastickpt.foreign.pickle_names import is_odd_tensor
from elastickpt.foreign.pickle_values import Instance
from elastickpt.foreign.plain_values import ReadTensor, to_plain
from elastickpt.format.arrays import Box
from elastickpt.format.encode_values import value_digest
from elastickpt.format.values import ArrayReference
from elastickpt.format.version import MAX_SMALL_ARRAY_NBYTES

Path: TypeAlias = tuple[object, ...]
_EXTRA_STATE = "_extra_state"
_BYTES = ("uint8", "bool")  # element types of which alone no model is made: random streams, masks


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor whose pieces lie in several places."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[FilePiece, ...]


Tensor: TypeAlias = StoredTensor | ChunkedTensor


@dataclass(slots=True)
class SortedOut:
    """What `sort_out` found; lists that grow while it walks."""

    wholes: list[WholeTensor] = field(default_factory=list)
    scalars: list[StateScalar] = field(default_factory=list)
    groups: list[ParamGroup] = field(default_factory=list)
    tied: list[TiedName] = field(default_factory=list)
    values: dict[str, object] = field(default_factory=dict)
    not_carried: list[NotCarried] = field(default_factory=list)


def sort_out(value: object, read: ReadTensor, *, where: str) -> SortedOut:
    """Every tensor and value of what was saved, once. Raises Malformed unless it is a mapping, ValueNotCarried by name."""
    if not isinstance(value, Mapping):
        raise Malformed(f"{where}: expected a mapping of names or of items, found a {type(value).__name__}")
    return _Sorter(read, where).run(value)


class _Sorter:
    def __init__(self, read: ReadTensor, where: str) -> None:
        self.read = read
        self.where = where
        self.found = SortedOut()

    def run(self, value: Mapping[object, object]) -> SortedOut:
        if _is_optimizer(value) or _is_model(value):
            self._item((), value)
        elif any(_has_model(one) for one in value.values()):
            self._members((), value)
        else:
            model = {key: one for key, one in value.items() if isinstance(one, StoredTensor | ChunkedTensor)}
            self._model("model", model)
            self._members((), {key: one for key, one in value.items() if key not in model})
        return self.found

    def _item(self, path: Path, value: Mapping[object, object]) -> None:
        item = ".".join(map(str, path))
        if _is_optimizer(value):
            self._optimizer(item or "optimizer", path, value)
        else:
            self._model(item or "model", value)

    def _members(self, path: Path, members: Mapping[object, object]) -> None:
        for key, value in members.items():
            self._member((*path, key), value)

    def _member(self, path: Path, value: object) -> None:
        if isinstance(value, Mapping) and (_is_optimizer(value) or _is_model(value)):
            self._item(path, value)
        elif isinstance(value, Mapping) and any(_is_of_note(one) for one in value.values()):
            self._members(path, value)
        elif isinstance(value, list) and any(_is_of_note(one) for one in value):
            self.found.values[_pointer(path)] = [None] * len(value)  # that it is a list: what is in it stands by itself
            self._members(path, dict(enumerate(value)))
        elif isinstance(value, StoredTensor | ChunkedTensor) and len(path) == 1:
            self._extra(path, value)
        else:
            self._value(path, value)

    def _value(self, path: Path, value: object) -> None:
        try:
            self.found.values[_pointer(path)] = self._plain(path, value)
        except ValueNotCarried as problem:
            self.found.not_carried.append(NotCarried(".".join(map(str, path)), problem.message))

    def _plain(self, path: Path, value: object) -> object:
        """The plain value; tensors too large for one are arrays of their own, with a reference in their place."""
        if isinstance(value, ChunkedTensor) or (isinstance(value, StoredTensor) and value.nbytes > MAX_SMALL_ARRAY_NBYTES):
            return self._extra(path, value)
        if isinstance(value, dict) and _holds_tensor(value):
            return type(value)((key, self._plain((*path, key), one)) for key, one in value.items())
        if isinstance(value, list) and _holds_tensor(value):
            return [self._plain((*path, k), one) for k, one in enumerate(value)]
        if isinstance(value, tuple) and _holds_tensor(value):
            return tuple(self._plain((*path, k), one) for k, one in enumerate(value))
        return to_plain(value, self.read, where=_pointer(path))

    def _extra(self, path: Path, value: Tensor) -> ArrayReference:
        reference = ArrayReference(str(path[0]), _pointer(path[1:])[1:])
        self.found.wholes.append(_whole(reference.item, reference.name, "", value))
        return reference

    def _model(self, item: str, members: Mapping[object, object]) -> None:
        first: dict[StoredTensor, str] = {}
        for key, value in members.items():
            name = str(key)
            if isinstance(value, StoredTensor) and value.count and first.setdefault(value, name) != name:
                self.found.tied.append(TiedName(item, name, first[value]))
            elif isinstance(value, StoredTensor | ChunkedTensor):
                self.found.wholes.append(_whole(item, name, "value", value))
            elif is_odd_tensor(value):
                raise ValueNotCarried(f"{self.where}: {item}: {name}: a tensor made by {value!r}, which no array can hold")
            elif value is not None:
                self.found.not_carried.append(NotCarried(f"{item}.{name}", "a module's extra state that is no tensor"))

    def _optimizer(self, item: str, path: Path, value: Mapping[object, object]) -> None:
        flat = _flattened(value) if "state" not in value else value
        groups = list(self._groups(item, path, flat.get("param_groups")))
        names: dict[LocalName, LocalName] = {}
        for group, told in groups:
            names.update(zip(group.members, told or group.members, strict=True))
        for group, told in groups:
            self.found.groups.append(ParamGroup(item, told or group.members, group.options))
        states = flat.get("state")
        if not isinstance(states, Mapping):
            raise Malformed(f"{self.where}: {item}: expected the mapping `state`")
        for key, of_one in states.items():
            if not isinstance(key, str | int) or not isinstance(of_one, Mapping):
                raise Malformed(f"{self.where}: {item}: expected the states of {key!r} by name")
            known: LocalName = int(key) if isinstance(key, str) and key.isdecimal() and int(key) in names else key
            self._states(item, names.get(known, known), of_one)
        rest = {key: one for key, one in value.items() if not _belongs_to_optimizer(key)}
        for key, one in rest.items():
            self._value((*(path or (item,)), key), one)

    def _states(self, item: str, name: LocalName, states: Mapping[object, object]) -> None:
        for state, value in states.items():
            if isinstance(value, StoredTensor | ChunkedTensor):
                self.found.wholes.append(_whole(item, name, str(state), value))
            else:
                plain = to_plain(value, self.read, where=f"{self.where}: {item}: {name}: {state}")
                self.found.scalars.append(StateScalar(item, name, str(state), plain))

    def _groups(self, item: str, path: Path, found: object) -> Iterator[tuple[ParamGroup, tuple[str, ...] | None]]:
        """Each group as it stands, and its members' names where the group has `param_names`."""
        if not isinstance(found, list):
            raise Malformed(f"{self.where}: {item}: expected the list `param_groups`")
        for number, group in enumerate(found):
            members = group.get("params") if isinstance(group, Mapping) else None
            if not isinstance(group, Mapping) or not isinstance(members, list):
                raise Malformed(f"{self.where}: {item}: param group {number} has no list `params`")
            if not all(isinstance(one, str | int) for one in members):
                raise Malformed(f"{self.where}: {item}: param group {number}: members are numbers or names")
            told = group.get("param_names")
            named = isinstance(told, list) and len(told) == len(members) and all(isinstance(one, str) for one in told)
            options = {
                str(key): to_plain(one, self.read, where=_pointer((*path, "param_groups", number, key)))
                for key, one in group.items()
                if key not in ("params", "param_names")
            }
            yield ParamGroup(item, tuple(members), options), tuple(map(str, told)) if named and isinstance(told, list) else None


def _whole(item: str, name: LocalName, state: str, value: Tensor) -> WholeTensor:
    if isinstance(value, ChunkedTensor):
        return WholeTensor(item, name, state, value.shape, value.dtype, value.pieces)
    pieces = (FilePiece(Box.whole(value.shape), value),) if value.count else ()
    return WholeTensor(item, name, state, value.shape, value.dtype, pieces)


def _pointer(path: Path) -> str:
    return "".join(f"/{str(one).replace('~', '~0').replace('/', '~1')}" for one in path)


def _is_optimizer(value: Mapping[object, object]) -> bool:
    if isinstance(value.get("state"), Mapping) and isinstance(value.get("param_groups"), list):
        return True
    keys = [key for key in value if isinstance(key, str)]
    return bool(keys) and any(key.startswith("param_groups.") for key in keys) and all(map(_belongs_to_optimizer, keys))


def _belongs_to_optimizer(key: object) -> bool:
    return key in ("state", "param_groups") or (isinstance(key, str) and key.startswith(("state.", "param_groups.")))


def _is_model(value: Mapping[object, object]) -> bool:
    """Names of tensors and of modules' extra states, and nothing else; not bytes alone."""
    tensors = [one for one in value.values() if isinstance(one, StoredTensor | ChunkedTensor)]
    others = [
        key
        for key, one in value.items()
        if not isinstance(one, StoredTensor | ChunkedTensor)
        and not (isinstance(key, str) and key.endswith(_EXTRA_STATE))
        and not is_odd_tensor(one)
    ]
    return not others and any(one.dtype not in _BYTES for one in tensors)


def _has_model(value: object) -> bool:
    if isinstance(value, list):
        return any(map(_has_model, value))
    if not isinstance(value, Mapping) or _is_optimizer(value):
        return False
    return _is_model(value) or any(map(_has_model, value.values()))


def _is_of_note(value: object) -> bool:
    """Whether a model or an optimizer stands in it."""
    if isinstance(value, list):
        return any(map(_is_of_note, value))
    if not isinstance(value, Mapping):
        return False
    return _is_optimizer(value) or _is_model(value) or any(map(_is_of_note, value.values()))


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensor, value))
    if isinstance(value, Instance):
        return any(map(_holds_tensor, (*value.arguments, value.state)))
    return isinstance(value, StoredTensor | ChunkedTensor)


def _flattened(value: Mapping[object, object]) -> dict[str, object]:
    """`state.<name>.<state>` and `param_groups.<name>.<option>` as an optimizer's two members.

    Options stand once a parameter: parameters whose options are all equal are one group.
    """
    states: dict[str, dict[str, object]] = {}
    options: dict[str, dict[str, object]] = {}
    for key, one in value.items():
        kind, _, rest = str(key).partition(".")
        name, _, last = rest.rpartition(".")
        if kind in ("state", "param_groups") and name:
            (states if kind == "state" else options).setdefault(name, {})[last] = one
    groups: dict[str, dict[str, object]] = {}
    for name, given in options.items():
        plain = {key: repr(one) if _holds_tensor(one) else one for key, one in sorted(given.items())}
        group = groups.setdefault(value_digest(plain), {**given, "params": []})
        members = group["params"]
        if isinstance(members, list):
            members.append(name)
    return {"state": states, "param_groups": list(groups.values())}
