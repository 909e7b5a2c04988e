"""What an optimizer holds per parameter and not as an array, in columns: written from live groups, read back into them.

A param group is not stored: each of its options is a column over parameter names, dictionary-coded. So a group can be
put together again from whatever parameters stand in it, at any layout.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from elastickpt.format.encode_values import typed_key, values_equal
from elastickpt.format.records import Field, FieldKind, OptimizerTable
from elastickpt.format.tables import TableKey, TableName, TableRow, rows_of
from elastickpt.format.values import Value


class TableBuilder:
    """An OptimizerTable while it is being made: rows are parameters, in the order of the optimizer's groups."""

    def __init__(self, item: str) -> None:
        self.item = item
        self._rows: list[TableName] = []
        self._columns: dict[TableKey, tuple[dict[Hashable, int], list[Value], dict[int, int]]] = {}

    def row(self, name: TableName) -> int:
        """Adds a parameter."""
        self._rows.append(name)
        return len(self._rows) - 1

    def put(self, kind: FieldKind, key: str, value: Value, *, rows: Iterable[int]) -> None:
        """The value of one field for these parameters."""
        codes, values, which = self._columns.setdefault((kind, key), ({}, [], {}))
        code = codes.setdefault(typed_key(value), len(values))
        if code == len(values):
            values.append(value)
        which.update(dict.fromkeys(rows, code))

    def finished(self) -> OptimizerTable:
        """The table; parameters without a value of a field have -1 there."""
        count = len(self._rows)
        fields = tuple(
            Field(kind, key, tuple(values), tuple(which.get(row, -1) for row in range(count)))
            for (kind, key), (_, values, which) in self._columns.items()
        )
        return OptimizerTable(self.item, tuple(self._rows), fields)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two parameters that must have one value, and have two."""

    first: TableName
    second: TableName
    values: tuple[Value, Value]


@dataclass(frozen=True, slots=True)
class OneValue:
    """The value that all parameters that have one agree on."""

    value: Value


class TableView:
    """A table of a checkpoint, by field and parameter name."""

    def __init__(self, table: OptimizerTable) -> None:
        self._table = table
        self._rows = {name: row for row, name in enumerate(table.parameters)}

    @cached_property
    def fields(self) -> Mapping[TableKey, Field]:
        """Its fields by (kind, key)."""
        return {(field.kind, field.key): field for field in self._table.fields}

    @cached_property
    def _by_name(self) -> Mapping[TableName, TableRow]:
        return rows_of(self._table)

    def has(self, name: TableName) -> bool:
        """Whether the optimizer had this parameter."""
        return name in self._rows

    def keys(self, kind: FieldKind) -> tuple[str, ...]:
        """The keys of all fields of one kind."""
        return tuple(key for each, key in self.fields if each == kind)

    def of(self, kind: FieldKind, name: TableName) -> dict[str, Value]:
        """All values of one kind that a parameter has."""
        return {key: value for (each, key), value in self._by_name[name].items() if each == kind}

    def agreed(self, kind: FieldKind, key: str, names: Iterable[TableName]) -> OneValue | Disagreement | None:
        """The one value of these parameters; None when none of them has one.

        Names that it does not know are left out.
        """
        field = self.fields.get((kind, key))
        if field is None:
            return None
        first: tuple[TableName, int] | None = None
        for name in names:
            code = field.which[self._rows[name]] if name in self._rows else -1
            if code < 0:
                continue
            if first is None:
                first = (name, code)
            elif not values_equal(field.values[first[1]], field.values[code]):
                return Disagreement(first[0], name, (field.values[first[1]], field.values[code]))
        return None if first is None else OneValue(field.values[first[1]])
