"""What an optimizer holds of each parameter: columns and rows, and columns inside msgpack records. [UCF-60, UCF-61]

On disk names are text, choices integer columns, values typed JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import get_args

from elastickpt.errors import Malformed
from elastickpt.format.canonical_json import dump_bounded
from elastickpt.format.encode_values import encode_value, value_digest
from elastickpt.format.long_texts import decode_text
from elastickpt.format.records import Field, FieldKind, OptimizerTable
from elastickpt.format.strict_reading import StrictObject, pack_ints, take_ints
from elastickpt.format.values import ArrayValue, Value

TableName = tuple[str, str]  # (model item, FQN)
TableKey = tuple[FieldKind, str]
TableRow = dict[TableKey, Value]


def rows_of(table: OptimizerTable) -> dict[TableName, TableRow]:
    """What the table says of each parameter, in its order."""
    return {
        name: {(field.kind, field.key): field.values[field.which[place]] for field in table.fields if field.which[place] >= 0}
        for place, name in enumerate(table.parameters)
    }


def table_of(item: str, rows: Mapping[TableName, TableRow]) -> OptimizerTable:
    """The table of these rows: parameters and columns sorted, each value of a column once. Raises ValueNotCarried."""
    names = tuple(sorted(rows))
    digest_of = _digests()
    fields = []
    for kind, key in sorted({key for row in rows.values() for key in row}):
        codes: dict[str, int] = {}
        values: list[Value] = []
        which = []
        for name in names:
            if (kind, key) not in rows[name]:
                which.append(-1)
                continue
            value = rows[name][kind, key]
            which.append(codes.setdefault(digest_of(value), len(values)))
            if which[-1] == len(values):
                values.append(value)
        fields.append(Field(kind, key, tuple(values), tuple(which)))
    return OptimizerTable(item, names, tuple(fields))


def _digests() -> Callable[[Value], str]:
    """`value_digest`, which remembers values for as long as it lives: nearly all parameters have the very objects of others, or
    arrays that are equal."""
    by_id: dict[int, tuple[Value, str]] = {}
    arrays: dict[ArrayValue, str] = {}

    def digest_of(value: Value) -> str:
        if type(value) is ArrayValue:
            if value not in arrays:
                arrays[value] = value_digest(value)
            return arrays[value]
        known = by_id.get(id(value))
        if known is None:
            known = by_id[id(value)] = value, value_digest(value)  # with the value, so that no id is used again
        return known[1]

    return digest_of


def without(table: OptimizerTable, names: Collection[TableName]) -> OptimizerTable:
    """The table of its other parameters, with the values that these have."""
    kept = [place for place, name in enumerate(table.parameters) if name not in names]
    fields = []
    for field in table.fields:
        which = tuple(field.which[place] for place in kept)
        used = sorted({code for code in which if code >= 0})
        codes = {old: new for new, old in enumerate(used)}
        values = tuple(field.values[old] for old in used)
        fields.append(Field(field.kind, field.key, values, tuple(codes.get(code, -1) for code in which)))
    return OptimizerTable(table.item, tuple(table.parameters[place] for place in kept), tuple(fields))


_KINDS: dict[str, FieldKind] = {kind: kind for kind in get_args(FieldKind)}


def pack_tables(tables: Iterable[OptimizerTable]) -> list[object]:
    """The tables as msgpack-able values. Raises ValueNotCarried for a value without a tag."""
    return [_pack_table(table) for table in tables]


def _pack_table(table: OptimizerTable) -> dict[str, object]:
    models = sorted({item for item, _ in table.parameters})
    place = {item: k for k, item in enumerate(models)}
    return {
        "item": table.item,
        "models": models,
        "model": pack_ints([place[item] for item, _ in table.parameters]),
        "names": [name for _, name in table.parameters],
        "fields": [_pack_field(table, field) for field in table.fields],
    }


def _pack_field(table: OptimizerTable, field: Field) -> dict[str, object]:
    where = f"/{table.item}/{field.key}"
    return {
        "kind": field.kind,
        "key": field.key,
        "values": dump_bounded(encode_value(list(field.values), where=where), where=where),
        "which": pack_ints(field.which),
    }


def take_tables(members: StrictObject, name: str) -> tuple[OptimizerTable, ...]:
    """The tables under a member. Raises Malformed."""
    where = f"{members.where}/{name}"
    tables = tuple(_table(StrictObject(one, where=f"{where}[{k}]")) for k, one in enumerate(members.sequence(name)))
    if len({table.item for table in tables}) != len(tables):
        raise Malformed(f"{where}: two tables of one optimizer")
    return tables


def _table(members: StrictObject) -> OptimizerTable:
    models = members.texts("models")
    names = members.texts("names")
    model = take_ints(members, "model", length=len(names), high=len(models) - 1).tolist()
    parameters = tuple((models[k], name) for k, name in zip(model, names, strict=True))
    if len(set(parameters)) != len(parameters):
        raise Malformed(f"{members.where}: a parameter stands twice in one table")
    fields = tuple(
        _field(StrictObject(one, where=f"{members.where}/fields[{k}]"), len(names))
        for k, one in enumerate(members.sequence("fields"))
    )
    if len({(field.kind, field.key) for field in fields}) != len(fields):
        raise Malformed(f"{members.where}: a field stands twice in one table")
    table = OptimizerTable(members.text("item"), parameters, fields)
    members.close()
    return table


def _field(members: StrictObject, count: int) -> Field:
    kind = _KINDS.get(members.text("kind"))
    if kind is None:
        raise Malformed(f"{members.where}/kind: expected one of {', '.join(_KINDS)}")
    values = decode_text(members.text("values"), where=f"{members.where}/values")
    if not isinstance(values, list):
        raise Malformed(f"{members.where}/values: expected a list")
    which = take_ints(members, "which", length=count, low=-1, high=len(values) - 1)
    field = Field(kind, members.text("key"), tuple(values), tuple(which.tolist()))
    members.close()
    return field
