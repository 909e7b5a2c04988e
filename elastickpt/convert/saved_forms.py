"""From contents to the nested values of torch and DCP files, and to safetensors: what goes where. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from elastickpt.convert.contents import Contents, NameGroups
from elastickpt.convert.nodes import Node
from elastickpt.errors import Refused
from elastickpt.foreign.assemble import NewArray, NewState, assemble
from elastickpt.foreign.dcp_plan import plan_dcp
from elastickpt.foreign.file_plans import FilePlan, NewTensor, constant_file
from elastickpt.foreign.listing import NotCarried, ParamGroup, StateScalar, TiedName
from elastickpt.foreign.plain_values import CLASS
from elastickpt.foreign.safetensors_plan import plan_safetensors
from elastickpt.foreign.torch_archive import plan_torch_archive
from elastickpt.format.arrays import ArrayId, dtype_named
from elastickpt.format.encode_values import value_digest
from elastickpt.format.tables import TableName, TableRow
from elastickpt.language.held import HeldPiece


@dataclass(frozen=True, slots=True)
class Delivery:
    """What goes into one slot, by the slot's key: all of an array, or what a rank has of it."""

    key: str
    node: Node
    pieces: tuple[HeldPiece, ...] | None  # None: the whole array as it is
    count: int  # elements of the slot

    @property
    def nbytes(self) -> int:
        return self.count * dtype_named(self.node.dtype).itemsize


@dataclass(frozen=True, slots=True)
class SavedForm:
    """Files to write, what goes into their slots, and what of the contents does not."""

    plans: tuple[FilePlan, ...]
    deliveries: tuple[Delivery, ...]
    single: bool = False
    not_carried: tuple[NotCarried, ...] = ()


def torch_form(contents: Contents, path: str) -> SavedForm:
    """One file of torch.save: {"model", "optimizer", ...} under the names of the whole."""
    state, deliveries = _new_state(contents)
    unknown = [item for item in contents.rows if item not in contents.orders]
    why = "in which order its groups have their parameters is not in the source: they stand by name, with `param_names`"
    lost = (*(NotCarried(item, why) for item in unknown), *_classes(contents))
    return SavedForm(
        (plan_torch_archive(path, assemble(state, keyed="number")),), deliveries, single=True, not_carried=tuple(lost)
    )


def dcp_form(contents: Contents) -> SavedForm:
    """A folder of torch.distributed.checkpoint."""
    state, deliveries = _new_state(contents)
    return SavedForm(plan_dcp(assemble(state, keyed="name")), deliveries, not_carried=tuple(_classes(contents)))


def safetensors_form(contents: Contents, shard_nbytes: int) -> SavedForm:
    """Weights in safetensors, with an index where they are several files; ties stand once."""
    weights = [one for one in contents.arrays.values() if one.id.state == "value"]
    items = {one.id.item for one in weights}
    if len(items) > 1:
        raise Refused(f"safetensors hold one model, and there are {', '.join(sorted(items))}: choose one with --only 'ITEM/*'")
    tensors = {one.id.name: _tensor(one.id, contents) for one in weights}
    for group in contents.tied:
        names = [name for _, name in group]
        known = next((name for name in names if name in tensors), None)
        if known is not None:
            tensors.update({name: tensors[known] for name in names if name not in tensors})
    deliveries = tuple(_whole(one.id, contents) for one in weights)
    lost = [NotCarried(str(one.id), "safetensors hold weights only") for one in contents.arrays.values() if one not in weights]
    lost += [NotCarried(item, "settings of an optimizer: safetensors hold weights only") for item in contents.rows]
    lost += [NotCarried(pointer, "safetensors hold weights only") for pointer in contents.values if pointer != "/config"]
    plans = plan_safetensors(tensors, notes={"format": "pt"}, shard_nbytes=shard_nbytes)
    return SavedForm(plans, deliveries, not_carried=tuple(lost))


def _tensor(identity: ArrayId, contents: Contents) -> NewTensor:
    node = contents.arrays[identity].node
    return NewTensor(str(identity), node.dtype, node.shape)


def _whole(identity: ArrayId, contents: Contents) -> Delivery:
    node = contents.arrays[identity].node
    return Delivery(str(identity), node, None, prod(node.shape))


def optimizer_of(contents: Contents, name: TableName) -> str:
    """The optimizer that a parameter's states belong to."""
    known = next((item for item, rows in contents.rows.items() if name in rows), None)
    return known or next(iter(contents.rows), "optimizer")


def counted_groups(rows: Mapping[TableName, TableRow], item: str, order: NameGroups) -> Iterator[ParamGroup]:
    """The param groups as a file counted them; a new one begins where options change, too."""
    by_name = {name: row for (_, name), row in rows.items()}
    known = {name for some in order for name in some}
    for some in (*order, tuple(name for name in by_name if name not in known)):
        last: tuple[tuple[str, str], ...] | None = None
        members: list[str] = []
        options: dict[str, object] = {}
        for name in (name for name in some if name in by_name):
            found = {key: value for (kind, key), value in by_name[name].items() if kind == "hyper"}
            code = tuple(sorted((key, value_digest(value)) for key, value in found.items()))
            if last is not None and code != last:
                yield ParamGroup(item, tuple(members), options)
                members = []
            members.append(name)
            last, options = code, found
        if members:
            yield ParamGroup(item, tuple(members), options)


def groups_of(rows: Mapping[TableName, TableRow], item: str, order: tuple[TableName, ...]) -> Iterator[ParamGroup]:
    """The param groups: parameters of the same options, in this order; a group stands where its first member does."""
    members: dict[tuple[tuple[str, str], ...], list[str]] = {}
    options: dict[tuple[tuple[str, str], ...], dict[str, object]] = {}
    for name in order:
        if name in rows:
            found = {key: value for (kind, key), value in rows[name].items() if kind == "hyper"}
            code = tuple((key, value_digest(value)) for key, value in found.items())
            members.setdefault(code, []).append(name[1])
            options[code] = found
    for code, names in members.items():
        yield ParamGroup(item, tuple(names), options[code])


def _new_state(contents: Contents) -> tuple[NewState, tuple[Delivery, ...]]:
    arrays = []
    for one in contents.arrays.values():
        item, name = one.id.item, one.id.name
        if one.id.section == "params" and one.id.state != "value":
            item = optimizer_of(contents, (item, name))
        arrays.append(NewArray(item, name, one.id.state, _tensor(one.id, contents)))
    order = tuple(contents.parameters())
    groups: list[ParamGroup] = []
    for item, rows in contents.rows.items():
        counted = contents.orders.get(item)
        groups += groups_of(rows, item, order) if counted is None else counted_groups(rows, item, counted)
    covered = {(group.item, name) for group in groups for name in group.members}
    for array in arrays:
        if array.state not in ("value", "") and (array.item, array.name) not in covered:
            covered.add((array.item, array.name))
            groups.append(ParamGroup(array.item, (array.name,), {}))
    scalars = [
        StateScalar(item, name, key, value)
        for item, rows in contents.rows.items()
        for (_, name), row in rows.items()
        for (kind, key), value in row.items()
        if kind == "scalar"
    ]
    tied = [TiedName(group[0][0], alias, group[0][1]) for group in contents.tied for _, alias in group[1:]]
    state = NewState(tuple(arrays), tuple(groups), tuple(scalars), tuple(tied), _values(contents))
    return state, tuple(_whole(identity, contents) for identity in contents.arrays)


def _values(contents: Contents) -> dict[str, object]:
    """The plain values, with the lists of schedulers back in their places."""
    values = {pointer: _without_classes(value) for pointer, value in contents.values.items()}
    for rows in contents.rows.values():
        groups: dict[str, dict[str, list[object]]] = {}
        seen: set[str] = set()
        for row in rows.values():
            code = "".join(value_digest(value) for (kind, _), value in row.items() if kind in ("hyper", "schedule"))
            if code in seen:
                continue
            seen.add(code)
            for (kind, key), value in row.items():
                if kind == "schedule":
                    item, _, inside = key.partition("/")
                    groups.setdefault(item, {}).setdefault(inside, []).append(value)
        for item, lists in groups.items():
            whole = values.get(f"/{item}")
            if isinstance(whole, dict):
                values[f"/{item}"] = {**whole, **{name: found for name, found in lists.items() if name in whole}}
    return values


def _classes(contents: Contents) -> Iterator[NotCarried]:
    """Objects of which only the attributes go along: no reader of such files takes their classes."""
    for pointer, value in contents.values.items():
        for place, name in _classes_in(value, pointer):
            yield NotCarried(place, f"its class {name}: a plain value stands for it")


def _classes_in(value: object, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        if CLASS in value:
            yield place, str(value[CLASS])
            yield from _classes_in(value.get("state"), place)
            return
        for key, one in value.items():
            yield from _classes_in(one, f"{place}/{key}")
    elif isinstance(value, list | tuple):
        for k, one in enumerate(value):
            yield from _classes_in(one, f"{place}/{k}")


def _without_classes(value: object) -> object:
    """A value without objects of a framework's own: their attributes, or what they were made with, stand for them."""
    if isinstance(value, dict):
        if CLASS in value:
            inner = value.get("state")
            return _without_classes(inner if isinstance(inner, dict) else value.get("arguments"))
        return type(value)((key, _without_classes(one)) for key, one in value.items())
    if isinstance(value, list):
        return [_without_classes(one) for one in value]
    return tuple(map(_without_classes, value)) if type(value) is tuple else value


def with_config(form: SavedForm, files: Mapping[str, bytes]) -> SavedForm:
    """The form with further files beside the tensors'."""
    return replace(form, plans=(*form.plans, *(constant_file(path, data) for path, data in files.items())))
