"""From what an importer lists, by a program, to the contents of a checkpoint. Reads 0-d states only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from elastickpt.convert.constants import constants_for
from elastickpt.convert.contents import Array, Contents, Laid, Name, Row, with_orders
from elastickpt.convert.nodes import Agreement, Gathered, Share
from elastickpt.errors import ProgramFault, Refused, StructureConflict
from elastickpt.foreign.listing import ForeignCheckpoint, Group, LocalName, NotCarried, StoredTensor
from elastickpt.format.arrays import ArrayId
from elastickpt.format.box import Box
from elastickpt.format.records import FieldKind, Item
from elastickpt.format.values import ArrayValue, Value, value_digest
from elastickpt.language import tree as t
from elastickpt.language.held import lower
from elastickpt.language.holders import Holder, LocalShape, RankShapes, WholeArray
from elastickpt.language.matching import Matched, match
from elastickpt.language.orders import counted
from elastickpt.language.printer import filled_in, print_program
from elastickpt.language.rules import Rules, resolve
from elastickpt.language.scope import ConstantValue, Scope

ReadBytes = Callable[[StoredTensor], bytes]
MODEL = "model"
Holds = dict[tuple[str, int], list[tuple[WholeArray, Holder]]]  # (local name, chunk) → the arrays that it is a part of


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a rank: a box of it may lie apart."""

    item: str
    name: LocalName
    state: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[tuple[Box, StoredTensor], ...]
    chunk: int


@dataclass(frozen=True, slots=True)
class _Rank:
    coordinate: Mapping[str, int]
    where: str
    tensors: tuple[_Tensor, ...]
    groups: tuple[Group, ...]
    empty: tuple[str, ...]


def lay(found: ForeignCheckpoint, program: t.Program, given: Mapping[str, ConstantValue], read: ReadBytes) -> Contents:
    """The contents that the program makes of the files. `given` are constants from the command line.

    Raises ProgramFault for what does not fit, Refused where what the files hold needs an order that nobody gave.
    """
    return _Laying(found, program, given, read).run()


class _Laying:
    def __init__(
        self, found: ForeignCheckpoint, program: t.Program, given: Mapping[str, ConstantValue], read: ReadBytes
    ) -> None:
        self._found, self._program, self._read = found, program, read
        self._constants = constants_for(program, found.constants, given)
        self._ranks = tuple(_ranks_of(found))
        self._sizes = {
            axis: 1 + max(rank.coordinate[axis] for rank in self._ranks)
            for axis in (self._ranks[0].coordinate if self._ranks else ())
        }
        self._rules: Rules = resolve(program, self._constants, self._sizes)
        self._values = [[k for k, one in enumerate(rank.tensors) if one.state == "value"] for rank in self._ranks]
        self._arrays: dict[ArrayId, Array] = {}
        self._rows: dict[str, dict[Name, Row]] = {}

    def run(self) -> Contents:
        matched = match(self._rules, [self._shapes(k) for k in range(len(self._ranks))])
        for array in matched.arrays:
            self._value(array)
        holds = self._holds(matched)
        self._states(holds)
        self._state_values(holds)
        self._groups(holds)
        self._extras()
        found = self._found
        tied = [(self._item(name), alias, name) for alias, name in matched.tied.items()]
        tied += [(one.item, one.alias, one.name) for one in found.tied]
        constants = dict(self._rules.scope.constants) | dict(matched.sizes)
        orders = self._counted(holds) if len(self._ranks) == 1 else {}
        program = with_orders(filled_in(self._program, constants, self._sizes), orders)
        return Contents(
            arrays=self._arrays,
            rows=self._rows,
            values=dict(found.values),
            items=tuple(self._items()),
            step=found.step,
            tied=tuple(((item, name), (item, alias)) for item, alias, name in tied),
            layout=Laid(self._program, constants, self._sizes),
            layout_text=print_program(program),
            orders=orders,
            not_carried=(*found.not_carried, *self._dropped(matched)),
            said=found.said,
        )

    def _shapes(self, rank: int) -> RankShapes:
        of = self._ranks[rank]
        tensors = tuple(
            LocalShape(of.tensors[k].item, str(of.tensors[k].name), of.tensors[k].shape, of.tensors[k].chunk)
            for k in self._values[rank]
        )
        return RankShapes(of.coordinate, tensors, of.where)

    def _dropped(self, matched: Matched) -> Iterator[NotCarried]:
        names = {str(self._ranks[rank].tensors[self._values[rank][index]].name) for rank, index in matched.dropped}
        for name in sorted(names):
            yield NotCarried(name, "the program drops it")

    # -- arrays

    def _value(self, array: WholeArray) -> None:
        self._add(array, "value", [(holder, self._tensor(holder)) for holder in array.holders])

    def _tensor(self, holder: Holder) -> _Tensor:
        """The value that a holder is of."""
        return self._ranks[holder.rank].tensors[self._values[holder.rank][holder.tensor]]

    def _add(self, array: WholeArray, state: str, tensors: Sequence[tuple[Holder, _Tensor]]) -> None:
        first = tensors[0][1]
        for holder, other in tensors:
            if other.dtype != first.dtype:
                raise StructureConflict(
                    f"array {array.name} {state}: {first.dtype} in {self._said(*tensors[0])}, {other.dtype} in "
                    f"{self._said(holder, other)}"
                )
        item = array.holders[0]
        identity = ArrayId("params", self._model_item(item), array.name, state)
        if identity in self._arrays:
            raise StructureConflict(f"array {identity} stands twice in the files")
        divided = not any(one.rule.flag("equal") for one, _ in tensors)
        shares = tuple(self._share(holder, tensor, state) for holder, tensor in tensors)
        node = Gathered(array.shape, first.dtype, shares, divided, tensors[0][0].rule.at)
        self._arrays[identity] = Array(identity, node, array.true)

    def _share(self, holder: Holder, tensor: _Tensor, state: str) -> Share:
        words = {hold.word for hold in holder.rule.holds}
        agreement: Agreement = "average" if "average" in words else "any" if "any" in words else "same"
        divisor = Fraction(1)
        stored = holder.rule.stored
        if stored is not None:
            powers = dict(stored.exponents)
            if state not in ("value", "master") and state not in powers:
                raise self._rules.scope.fault(
                    f"state {state!r} of a tensor that is stored divided: say its exponent, as in 'stored /n ({state}: -1)'",
                    holder.rule.at,
                )
            divisor = 1 / Fraction(self._rules.scope.value(stored.by)) ** powers.get(state, 1)
        return Share(tensor.shape, tensor.parts, holder.held.pieces, self._said(holder, tensor), agreement, 1 / divisor)

    def _said(self, holder: Holder, tensor: _Tensor) -> str:
        return f"{tensor.name} of {self._ranks[holder.rank].where}"

    def _model_item(self, holder: Holder) -> str:
        return self._tensor(holder).item

    def _item(self, name: str) -> str:
        return next((one.item for one in self._arrays if one.name == name and one.state == "value"), MODEL)

    # -- states

    def _holds(self, matched: Matched) -> list[Holds]:
        """For each rank: (local name, chunk) of a value → the whole arrays that it is a part of."""
        found: list[Holds] = [{} for _ in self._ranks]
        for array in matched.arrays:
            for holder in array.holders:
                tensor = self._tensor(holder)
                found[holder.rank].setdefault((str(tensor.name), tensor.chunk), []).append((array, holder))
        return found

    def _states(self, holds: Sequence[Holds]) -> None:
        collected: dict[tuple[str, str], tuple[WholeArray, list[tuple[Holder, _Tensor]]]] = {}
        for number, rank in enumerate(self._ranks):
            names = self._names(number, holds[number])
            for tensor in rank.tensors:
                if tensor.state == "value":
                    continue
                for array, holder in holds[number].get(names(tensor.item, tensor.name), ()):
                    if tensor.shape == ():
                        if array.shape != ():
                            self._scalar(tensor, array, holder)
                            continue
                    elif tensor.shape != self._local_shape(holder):
                        raise Refused(
                            f"{tensor.state} of {array.name}: shape {tensor.shape}, its value has {self._local_shape(holder)}; "
                            "how such a state lies is not known: leave it out with --skip"
                        )
                    _, held = collected.setdefault((array.name, tensor.state), (array, []))
                    held.append((holder, tensor))
        for (_, state), (array, held) in collected.items():
            if len(held) != len(array.holders):
                lacking = sorted(
                    {self._ranks[h.rank].where for h in array.holders} - {self._ranks[h.rank].where for h, _ in held}
                )
                raise StructureConflict(f"array {array.name}: {', '.join(lacking[:3])} lacks its state {state!r}")
            self._add(array, state, held)

    def _local_shape(self, holder: Holder) -> tuple[int, ...]:
        return self._tensor(holder).shape

    def _scalar(self, tensor: _Tensor, array: WholeArray, holder: Holder) -> None:
        data = self._read(tensor.parts[0][1])
        value = ArrayValue(tensor.dtype, (), data, "torch")
        self._put((self._model_item(holder), array.name), tensor.item, ("scalar", tensor.state), value)

    def _state_values(self, holds: Sequence[Holds]) -> None:
        """States that are plain values in the file."""
        names = self._names(0, holds[0])
        for scalar in self._found.scalars:
            for array, holder in holds[0].get(names(scalar.item, scalar.name), ()):
                self._put((self._model_item(holder), array.name), scalar.item, ("scalar", scalar.state), scalar.value)

    def _counted(self, holds: Sequence[Holds]) -> dict[str, tuple[str, ...]]:
        """Whole names in the order in which each optimizer's groups have them."""
        names = self._names(0, holds[0])
        found: dict[str, dict[str, None]] = {}
        for group in self._ranks[0].groups:
            for member in group.members:
                for array, _ in holds[0].get(names(group.item, member), ()):
                    found.setdefault(group.item, {})[array.name] = None
        return {item: tuple(some) for item, some in found.items()}

    def _extras(self) -> None:
        """Tensors that are no states of parameters."""
        for one in self._found.wholes:
            if one.state == "":
                identity = ArrayId("extra", one.item, str(one.name), "")
                parts = tuple((piece.box, piece.stored) for piece in one.pieces)
                held = lower([t.Number(extent) for extent in one.shape], Scope(), {})
                share = Share(one.shape, parts, held.pieces, str(identity))
                self._arrays[identity] = Array(identity, Gathered(one.shape, one.dtype, (share,), False, t.NOWHERE))

    def _put(self, name: Name, optimizer: str, key: tuple[FieldKind, str], value: Value) -> None:
        row = self._rows.setdefault(optimizer, {}).setdefault(name, {})
        known = row.setdefault(key, value)
        if known is not value and value_digest(known) != value_digest(value):
            raise StructureConflict(f"{key[1]} of {name[1]}: {known!r} on one rank, {value!r} on another")

    def _names(self, rank: int, held: Holds) -> Callable[[str, LocalName], tuple[str, int]]:
        """(optimizer item, name or number) → (local name, chunk) of the parameter that is meant."""
        of = self._ranks[rank]
        values = [one for k in self._values[rank] if (str((one := of.tensors[k]).name), one.chunk) in held]
        chunks = {str(one.name): one.chunk for one in values}
        orders: dict[str, tuple[_Tensor, ...]] = {}

        def find(item: str, name: LocalName) -> tuple[str, int]:
            if isinstance(name, str):
                return name, chunks.get(name, 0)
            if item not in orders:
                orders[item] = self._order(item, of, values)
            if name >= len(orders[item]):
                raise Refused(f"{of.where}: {item} counts to {name}, its order has {len(orders[item])} names")
            one = orders[item][name]
            return str(one.name), one.chunk

        return find

    def _order(self, item: str, rank: _Rank, values: Sequence[_Tensor]) -> tuple[_Tensor, ...]:
        members = [member for group in rank.groups if group.item == item for member in group.members]
        order = self._rules.orders.get(item)
        if order is None:
            raise ProgramFault(_wanted_order(item, rank, members))
        shapes = [LocalShape(one.item, str(k), one.shape, one.chunk) for k, one in enumerate(values)]
        named = [LocalShape(one.item, str(one.name), one.shape, one.chunk) for one in values]
        if isinstance(order.by, tuple):
            found = tuple(values[int(k)] for k in counted(order, self._rules, shapes, {}))
        else:
            by_name = {str(one.name): one for one in values}
            found = tuple(by_name[name] for name in counted(order, self._rules, named, {}))
        if members and len(found) != len(members):
            raise self._rules.scope.fault(
                f"order {item!r} has {len(found)} names, the files count {len(members)} parameters in {rank.where}", order.at
            )
        return found

    # -- hyper-parameters

    def _groups(self, holds: Sequence[Holds]) -> None:
        for number, rank in enumerate(self._ranks):
            names = self._names(number, holds[number])
            for group in rank.groups:
                for member in group.members:
                    for array, holder in holds[number].get(names(group.item, member), ()):
                        name = (self._model_item(holder), array.name)
                        self._rows.setdefault(group.item, {}).setdefault(name, {})
                        for key, value in group.options.items():
                            if key != "param_names":
                                self._put(name, group.item, ("hyper", key), value)

    def _items(self) -> Iterator[Item]:
        models = dict.fromkeys(one.item for one in self._arrays if one.section == "params")
        yield from (Item(name, "module", "") for name in models)
        yield from (Item(name, "optimizer", "") for name in self._rows if name not in models)
        for pointer in self._found.values:
            name = pointer.split("/")[1].replace("~1", "/").replace("~0", "~") if pointer.startswith("/") else pointer
            if name not in models and name not in self._rows:
                yield Item(name, "values", type(self._found.values[pointer]).__name__)
        yield from (Item(one.item, "values", "Tensor") for one in self._arrays if one.section == "extra")


def _wanted_order(item: str, rank: _Rank, members: Sequence[LocalName]) -> str:
    """A refusal with a clause to fill in."""
    shapes = {one.name: one.shape for one in rank.tensors if one.item == item and one.state == "exp_avg"}
    shapes = shapes or {one.name: one.shape for one in rank.tensors if one.item == item and one.shape != ()}
    numbers = sorted({*(m for m in members if isinstance(m, int)), *(n for n in shapes if isinstance(n, int))})
    lines = [f"    NAME    # {number}{f', shape {shapes[number]}' if number in shapes else ', no state'}" for number in numbers]
    return (
        f"{rank.where}: {item} counts its parameters, in which order is in no file: give --rules a program with this, or "
        f"leave them out with --skip:\norder {item}:\n" + "\n".join(lines)
    )


def _ranks_of(found: ForeignCheckpoint) -> Iterator[_Rank]:
    for rank in found.ranks:
        tensors = tuple(
            _Tensor(
                one.item,
                one.name,
                one.state,
                one.stored.shape,
                one.stored.dtype,
                ((Box.whole(one.stored.shape), one.stored),),
                one.chunk,
            )
            for one in rank.tensors
        )
        yield _Rank(dict(rank.coordinate), rank.file, tensors, rank.groups, rank.empty)
    if found.wholes or not found.ranks:
        wholes = tuple(
            _Tensor(
                one.item, one.name, one.state, one.shape, one.dtype, tuple((piece.box, piece.stored) for piece in one.pieces), 0
            )
            for one in found.wholes
            if one.state
        )
        yield _Rank({}, found.folder, wholes, found.groups, ())
