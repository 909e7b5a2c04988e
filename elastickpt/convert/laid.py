"""From what an importer lists, by a program, to the contents of a checkpoint. Reads 0-d states only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

from elastickpt.convert.constants import constants_for
from elastickpt.convert.contents import Array, Contents, Laid, NameGroups, with_orders
from elastickpt.convert.local_tensors import Local, local_ranks
from elastickpt.convert.nodes import Agreement, Gathered, RankPart
from elastickpt.convert.owners import OwnerKey, Owners
from elastickpt.errors import Refused, StructureConflict
from elastickpt.foreign.listing import ForeignCheckpoint, LocalName, NotCarried, StoredTensor
from elastickpt.format.arrays import ArrayId
from elastickpt.format.encode_values import value_digest
from elastickpt.format.records import FieldKind, Item
from elastickpt.format.tables import TableName, TableRow
from elastickpt.format.values import ArrayValue, Value
from elastickpt.language import tree as t
from elastickpt.language.held import lower
from elastickpt.language.holders import Holder, LocalShape, RankShapes, WholeArray
from elastickpt.language.matching import Matched, match
from elastickpt.language.orders import Places, as_in_files
from elastickpt.language.printer import filled_in, print_program
from elastickpt.language.rules import Rules, resolve
from elastickpt.language.scope import ConstantValue, Scope

ReadBytes = Callable[[StoredTensor], bytes]
MODEL = "model"
Holds = dict[OwnerKey, list[tuple[WholeArray, Holder]]]  # a value → the arrays that it is a part of


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
        self._ranks = tuple(local_ranks(found))
        self._sizes = {
            axis: 1 + max(rank.coordinate[axis] for rank in self._ranks)
            for axis in (self._ranks[0].coordinate if self._ranks else ())
        }
        self._rules: Rules = resolve(program, self._constants, self._sizes)
        self._values = [[k for k, one in enumerate(rank.tensors) if one.state == "value"] for rank in self._ranks]
        self._arrays: dict[ArrayId, Array] = {}
        self._rows: dict[str, dict[TableName, TableRow]] = {}
        self._lost: dict[str, NotCarried] = {}
        self._owners: list[Owners] = []
        self._left: set[TableName] = set()  # values that the program drops

    def run(self) -> Contents:
        matched = match(self._rules, [self._shapes(k) for k in range(len(self._ranks))])
        for array in matched.arrays:
            self._value(array)
        for rank, index in matched.dropped:
            one = self._ranks[rank].tensors[self._values[rank][index]]
            self._left.add((one.item, str(one.name)))
        holds = self._holds(matched)
        self._owners = [self._owners_of(k, held) for k, held in enumerate(holds)]
        self._states(holds)
        self._state_values(holds)
        self._groups(holds)
        self._extras()
        found = self._found
        tied = [(item, alias, name) for (item, alias), name in matched.tied.items()]
        tied += [(one.item, one.alias, one.name) for one in found.tied]
        constants = dict(self._rules.scope.constants) | dict(matched.lists) | dict(matched.sizes)
        orders = self._counted(holds) if len(self._ranks) == 1 else {}
        program = as_in_files(self._program, self._models(matched))
        program = with_orders(filled_in(program, constants, self._sizes), orders)
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
            not_carried=(*found.not_carried, *self._dropped(matched), *self._lost.values()),
            said=(*found.said, *dict.fromkeys(note for one in self._owners for note in one.notes)),
        )

    def _shapes(self, rank: int) -> RankShapes:
        of = self._ranks[rank]
        tensors = tuple(
            LocalShape(of.tensors[k].item, str(of.tensors[k].name), of.tensors[k].shape, of.tensors[k].chunk)
            for k in self._values[rank]
        )
        return RankShapes(of.coordinate, tensors, of.where)

    def _models(self, matched: Matched) -> Iterator[list[Places]]:
        """Of each rank and chunk, the rules of its tensors in the order of the file."""
        found: dict[tuple[int, int], dict[int, Places]] = {}
        for array in matched.arrays:
            for one in array.holders:
                own = found.setdefault((one.rank, self._tensor(one).chunk), {})
                own[one.tensor] = tuple(line for line, _ in one.rule.path)
        return ([own[k] for k in sorted(own)] for own in found.values())

    def _dropped(self, matched: Matched) -> Iterator[NotCarried]:
        names = {str(self._ranks[rank].tensors[self._values[rank][index]].name) for rank, index in matched.dropped}
        for name in sorted(names):
            yield NotCarried(name, "the program drops it")

    # -- arrays

    def _value(self, array: WholeArray) -> None:
        self._add(array, "value", [(holder, self._tensor(holder)) for holder in array.holders])

    def _tensor(self, holder: Holder) -> Local:
        """The value that a holder is of."""
        return self._ranks[holder.rank].tensors[self._values[holder.rank][holder.tensor]]

    def _add(self, array: WholeArray, state: str, tensors: Sequence[tuple[Holder, Local]]) -> None:
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
        node = Gathered(array.shape, first.dtype, shares, divided, tensors[0][0].rule.at, self._rules.scope)
        self._arrays[identity] = Array(identity, node, array.true)

    def _share(self, holder: Holder, tensor: Local, state: str) -> RankPart:
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
        worker = tuple(holder.at.get(axis, 0) for axis in holder.rule.averaged)
        return RankPart(
            tensor.shape, tensor.parts, holder.held.pieces, self._said(holder, tensor), agreement, 1 / divisor, worker
        )

    def _said(self, holder: Holder, tensor: Local) -> str:
        return f"{tensor.name} of {self._ranks[holder.rank].where}"

    def _model_item(self, holder: Holder) -> str:
        return self._tensor(holder).item

    # -- states

    def _holds(self, matched: Matched) -> list[Holds]:
        found: list[Holds] = [{} for _ in self._ranks]
        for array in matched.arrays:
            for holder in array.holders:
                tensor = self._tensor(holder)
                key = (tensor.item, str(tensor.name), tensor.chunk)
                found[holder.rank].setdefault(key, []).append((array, holder))
        return found

    def _owners_of(self, rank: int, held: Holds) -> Owners:
        values = [self._ranks[rank].tensors[k] for k in self._values[rank]]
        return Owners(self._rules, self._ranks[rank], [one for one in values if (one.item, str(one.name), one.chunk) in held])

    def _states(self, holds: Sequence[Holds]) -> None:
        collected: dict[tuple[str, str, str], tuple[WholeArray, list[tuple[Holder, Local]]]] = {}
        for number, rank in enumerate(self._ranks):
            for tensor in rank.tensors:
                if tensor.state == "value":
                    continue
                owner = self._owners[number].find(tensor.item, tensor.name)
                found = holds[number].get(owner, ())
                if owner[:2] in self._left:
                    continue  # `_named` says so
                if rank.whole and (not found or tensor.shape not in ((), self._local_shape(found[0][1]))):
                    self._alone(tensor, owner)
                    continue
                if not found:
                    said = f"{rank.where}: {tensor.item}: {tensor.state} of {tensor.name!r}, which is no tensor of a model"
                    raise StructureConflict(f"{said} there: leave it out with --skip")
                for array, holder in found:
                    if tensor.shape == () and array.shape != ():
                        self._scalar(tensor, (owner[0], array.name))
                        continue
                    self._require_shape(tensor, array, holder)
                    _, held = collected.setdefault((owner[0], array.name, tensor.state), (array, []))
                    held.append((holder, tensor))
        for (_, _, state), (array, held) in collected.items():
            if len(held) != len(array.holders):
                lacking = sorted(
                    {self._ranks[h.rank].where for h in array.holders} - {self._ranks[h.rank].where for h, _ in held}
                )
                raise StructureConflict(f"array {array.name}: {', '.join(lacking[:3])} lacks its state {state!r}")
            self._add(array, state, held)

    def _require_shape(self, tensor: Local, array: WholeArray, holder: Holder) -> None:
        """A state lies as its value does, or it is not known how."""
        if tensor.shape not in ((), self._local_shape(holder)):
            raise Refused(
                f"{tensor.state} of {array.name}: shape {tensor.shape}, its value has {self._local_shape(holder)}; "
                "how such a state lies is not known: leave it out with --skip"
            )

    def _alone(self, tensor: Local, owner: OwnerKey) -> None:
        """A state of a whole source that has a shape of its own, or whose parameter is not in the file."""
        if tensor.shape == ():
            self._scalar(tensor, owner[:2])
            return
        identity = ArrayId("params", owner[0], owner[1], tensor.state)
        if identity in self._arrays:
            raise StructureConflict(f"array {identity} stands twice in the files")
        self._arrays[identity] = Array(identity, self._as_it_is(tensor, str(identity)))

    def _as_it_is(self, tensor: Local, where: str) -> Gathered:
        held = lower([t.Number(extent) for extent in tensor.shape], Scope(), {})
        share = RankPart(tensor.shape, tensor.parts, held.pieces, where)
        return Gathered(tensor.shape, tensor.dtype, (share,), False, t.NOWHERE, self._rules.scope)

    def _local_shape(self, holder: Holder) -> tuple[int, ...]:
        return self._tensor(holder).shape

    def _scalar(self, tensor: Local, name: TableName) -> None:
        data = self._read(tensor.parts[0][1])
        self._put(name, tensor.item, ("scalar", tensor.state), ArrayValue(tensor.dtype, (), data, "torch"))

    def _state_values(self, holds: Sequence[Holds]) -> None:
        """States that are plain values in the file."""
        for number, rank in enumerate(self._ranks):
            for scalar in rank.scalars:
                for name in self._named(number, holds[number], scalar.item, scalar.name):
                    self._put(name, scalar.item, ("scalar", scalar.state), scalar.value)

    def _named(self, rank: int, held: Holds, optimizer: str, member: LocalName) -> list[TableName]:
        """The whole arrays that an optimizer's parameter is a part of."""
        owner = self._owners[rank].find(optimizer, member)
        names = [(owner[0], array.name) for array, _ in held.get(owner, ())]
        if not names and any((one.item, one.name) == owner[:2] for one in self._arrays):
            names = [owner[:2]]  # only states of it are there
        if not names:
            place = f"{optimizer}/{member}"
            self._lost[place] = NotCarried(place, "settings of a parameter of which nothing is in the files")
        return names

    def _counted(self, holds: Sequence[Holds]) -> dict[str, NameGroups]:
        """Whole names in the order in which each optimizer's groups have them; one that several have is the first one's."""
        found: dict[str, list[tuple[str, ...]]] = {}
        seen: set[TableName] = set()
        for group in self._ranks[0].groups:
            names = dict.fromkeys(one for member in group.members for one in self._named(0, holds[0], group.item, member))
            found.setdefault(group.item, []).append(tuple(name for item, name in names if (group.item, name) not in seen))
            seen.update((group.item, name) for _, name in names)
            if not group.members:
                place = f"{group.item}/param_groups/{len(found[group.item]) - 1}"
                self._lost[place] = NotCarried(place, "a param group without parameters")
        return {item: tuple(some for some in groups if some) for item, groups in found.items()}

    def _extras(self) -> None:
        """Tensors that are no states of parameters."""
        for one in self._found.wholes:
            if one.state == "":
                identity = ArrayId("extra", one.item, str(one.name), "")
                parts = tuple((piece.box, piece.stored) for piece in one.pieces)
                tensor = Local(one.item, one.name, "", one.shape, one.dtype, parts, 0)
                self._arrays[identity] = Array(identity, self._as_it_is(tensor, str(identity)))

    def _put(self, name: TableName, optimizer: str, key: tuple[FieldKind, str], value: Value) -> None:
        row = self._rows.setdefault(optimizer, {}).setdefault(name, {})
        known = row.setdefault(key, value)
        if known is not value and value_digest(known) != value_digest(value):
            raise StructureConflict(f"{key[1]} of {name[1]}: {known!r} on one rank, {value!r} on another")

    # -- hyper-parameters

    def _groups(self, holds: Sequence[Holds]) -> None:
        for number, rank in enumerate(self._ranks):
            for group in rank.groups:
                for member in group.members:
                    for name in self._named(number, holds[number], group.item, member):
                        self._rows.setdefault(group.item, {}).setdefault(name, {})
                        for key, value in group.options.items():
                            if key != "param_names":
                                self._put(name, group.item, ("hyper", key), value)

    def _items(self) -> Iterator[Item]:
        models = dict.fromkeys(one.item for one in self._arrays if one.section == "params")
        found = {name: Item(name, "optimizer", "") for name in self._rows} | {name: Item(name, "module", "") for name in models}
        for pointer, value in self._found.values.items():
            name, _, below = pointer.removeprefix("/").partition("/")
            name = name.replace("~1", "/").replace("~0", "~")
            found.setdefault(name, Item(name, "values", "dict" if below else type(value).__name__))
        for one in self._arrays:
            if one.section == "extra":
                found.setdefault(one.item, Item(one.item, "values", "Tensor"))
        return iter(found.values())
