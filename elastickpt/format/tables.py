"""What an optimizer holds of each parameter: from columns to rows, and back. [UCF-60]"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from elastickpt.format.records import Field, FieldKind, OptimizerTable
from elastickpt.format.values import Value, value_digest

Name = tuple[str, str]  # (model item, FQN)
Key = tuple[FieldKind, str]
Row = dict[Key, Value]


def rows_of(table: OptimizerTable) -> dict[Name, Row]:
    """What the table says of each parameter, in its order."""
    return {
        name: {(field.kind, field.key): field.values[field.which[place]] for field in table.fields if field.which[place] >= 0}
        for place, name in enumerate(table.parameters)
    }


def table_of(item: str, rows: Mapping[Name, Row]) -> OptimizerTable:
    """The table of these rows: parameters and columns sorted, each value of a column once. Raises ValueNotCarried."""
    names = tuple(sorted(rows))
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
            which.append(codes.setdefault(value_digest(value), len(values)))
            if which[-1] == len(values):
                values.append(value)
        fields.append(Field(kind, key, tuple(values), tuple(which)))
    return OptimizerTable(item, names, tuple(fields))


def without(table: OptimizerTable, names: Collection[Name]) -> OptimizerTable:
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
