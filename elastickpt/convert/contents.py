"""A checkpoint between two formats: its arrays as nodes, and all its plain values. What is changed here costs no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property

from elastickpt.convert.nodes import Node
from elastickpt.errors import Refused
from elastickpt.foreign.listing import NotCarried
from elastickpt.format.arrays import ArrayId
from elastickpt.format.records import Item, OptimizerTable
from elastickpt.format.tables import TableName, TableRow, table_of
from elastickpt.format.values import Value
from elastickpt.language.scope import ConstantValue
from elastickpt.language.tree import Let, Names, Needs, Number, Order, OrderMember, Pattern, Program, Within

NameGroups = tuple[tuple[str, ...], ...]  # names, by param groups
MAX_ORDER_LENGTH = 1 << 19  # characters of names: half of what a text of the language may have


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """One array to be. `true` is its shape without padding, None where nothing is padded."""

    id: ArrayId
    node: Node
    true: tuple[int, ...] | None = None
    attributes: tuple[tuple[str, Value], ...] = ()


@dataclass(frozen=True, slots=True)
class Laid:
    """How the source lies over ranks: the program with the constants and sizes that were found."""

    program: Program
    constants: Mapping[str, ConstantValue]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Contents:
    """All that a conversion carries. `rows` are what optimizers hold per parameter, by optimizer item."""

    arrays: Mapping[ArrayId, Array]
    rows: Mapping[str, Mapping[TableName, TableRow]]
    values: Mapping[str, Value]
    items: tuple[Item, ...]
    step: int | None
    tied: tuple[tuple[TableName, ...], ...] = ()
    layout: Laid | None = None
    layout_text: str | None = None
    not_carried: tuple[NotCarried, ...] = ()
    said: tuple[str, ...] = ()
    orders: Mapping[str, NameGroups] = field(default_factory=dict)  # optimizer item → its parameters, as a file counted them

    def tables(self) -> tuple[OptimizerTable, ...]:
        """The optimizers' rows as columns."""
        return tuple(table_of(item, rows) for item, rows in self.rows.items())

    def parameters(self) -> dict[TableName, dict[str, Array]]:
        """(item, name) → its states."""
        found: dict[TableName, dict[str, Array]] = {}
        for one in self.arrays.values():
            if one.id.section == "params":
                found.setdefault((one.id.item, one.id.name), {})[one.id.state] = one
        return found

    def parameters_of(self, item: str, name: str) -> dict[str, Array]:
        """The states of one parameter."""
        return self._by_name[item, name]

    @cached_property
    def _by_name(self) -> dict[TableName, dict[str, Array]]:
        return self.parameters()


def with_arrays(contents: Contents, arrays: Iterable[Array]) -> Contents:
    """The contents with other arrays, each id once."""
    found: dict[ArrayId, Array] = {}
    for one in arrays:
        if one.id in found:
            raise Refused(f"array {one.id} would be made twice")
        found[one.id] = one
    return replace(contents, arrays=found)


def selected(contents: Contents, only: Iterable[str], skip: Iterable[str]) -> Contents:
    """What is left under globs of whole names: of `name`, `item/name`, `name/state` or `item/name/state`."""
    keep, leave = tuple(only), tuple(skip)
    if not keep and not leave:
        return contents
    left = [one for one in contents.arrays.values() if (not keep or _matches(one.id, keep)) and not _matches(one.id, leave)]
    names = {(one.id.item, one.id.name) for one in left}
    rows = {item: {name: row for name, row in of.items() if name in names} for item, of in contents.rows.items()}
    tied = tuple(group for group in contents.tied if any(name in names for name in group))
    return replace(with_arrays(contents, left), rows={item: of for item, of in rows.items() if of}, tied=tied)


def _matches(identity: ArrayId, globs: tuple[str, ...]) -> bool:
    item, name, state = identity.item, identity.name, identity.state
    texts = (name, f"{item}/{name}", f"{name}/{state}", f"{item}/{name}/{state}")
    return any(fnmatchcase(text, glob) for glob in globs for text in texts)


def with_orders(program: Program, orders: Mapping[str, NameGroups]) -> Program:
    """The program with these orders written out, where they fit a text of the language."""
    known = {one.name for one in program.statements if isinstance(one, Order)}
    fit = {item: of for item, of in orders.items() if item not in known and _spellable((*of, (item,)))}
    clauses = tuple(
        Order(
            item,
            Names(
                tuple(
                    OrderMember(Pattern((name,)), None, k == 0 < number)
                    for number, some in enumerate(of)
                    for k, name in enumerate(some)
                )
            ),
        )
        for item, of in fit.items()
    )
    first = next((k for k, one in enumerate(program.statements) if isinstance(one, Within)), len(program.statements))
    return replace(program, statements=(*program.statements[:first], *clauses, *program.statements[first:]))


def with_constants(program: Program, constants: Mapping[str, ConstantValue]) -> Program:
    """The program with further constants, which a later conversion may need; those that it has stay as they are."""
    known = {need.name for one in program.statements if isinstance(one, Needs) for need in one.needs}
    known |= {one.name for one in program.statements if isinstance(one, Let)}
    new = {name: value for name, value in constants.items() if name not in known and isinstance(value, int)}
    return replace(program, statements=(*(Let(name, Number(value)) for name, value in new.items()), *program.statements))


def _spellable(groups: NameGroups) -> bool:
    names = [name for some in groups for name in some]
    return sum(map(len, names)) < MAX_ORDER_LENGTH and not any('"' in name or "\n" in name for name in names)
