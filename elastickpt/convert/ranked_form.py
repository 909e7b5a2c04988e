"""From contents to Megatron's legacy files, by a program: what each rank's file holds. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from elastickpt.convert.constants import constants_for
from elastickpt.convert.contents import Array, Contents
from elastickpt.convert.nodes import Mapped, Node, Term, resized
from elastickpt.convert.options import Options
from elastickpt.convert.saved_forms import Delivery, SavedForm, optimizer_of
from elastickpt.errors import Refused
from elastickpt.foreign.file_plans import NewTensor
from elastickpt.foreign.listing import NotCarried, ParamGroup
from elastickpt.foreign.megatron_plan import OF_STAGES, NewRank, plan_megatron_legacy
from elastickpt.foreign.plain_values import CLASS, from_plain
from elastickpt.format.arrays import ArrayId
from elastickpt.format.encode_values import value_digest
from elastickpt.format.tables import TableName, TableRow
from elastickpt.format.values import ArrayReference
from elastickpt.language import tree as t
from elastickpt.language.holders import LocalShape
from elastickpt.language.orders import counted
from elastickpt.language.placing import PlacedTensor, place
from elastickpt.language.renaming import NamedShape
from elastickpt.language.rules import Rules, needed, resolve

AXES = ("pp", "tp")  # of the names of the files
_PADDED = "padded_vocab_size"  # in `args`


def megatron_form(contents: Contents, program: t.Program, facts: Mapping[str, object], options: Options) -> SavedForm:
    """The files of all ranks. Raises ProgramFault where the program does not fit, Refused for more than one model."""
    names = {need.name for need in needed(program)}
    given = {name: value for name, value in options.constants.items() if name in names}
    rules = resolve(program, constants_for(program, facts, given), options.mesh)
    strange = [axis for axis in rules.axes if axis not in AXES and rules.scope.axes[axis] > 1]
    if strange:
        raise Refused(f"--mesh {strange[0]}: Megatron's legacy files have the axes {' and '.join(AXES)} only")
    step = contents.step if contents.step is not None else options.step or 0  # the layout has no way to say none
    return _Forming(contents, rules, step).run()


@dataclass(slots=True)
class _RankUnder:
    """One rank's file under way."""

    chunks: list[dict[str, NewTensor | None]]
    placed: list[PlacedTensor] = field(default_factory=list)
    states: dict[int, dict[str, object]] = field(default_factory=dict)
    masters: dict[int, NewTensor] = field(default_factory=dict)
    groups: tuple[ParamGroup, ...] = ()


class _Forming:
    def __init__(self, contents: Contents, rules: Rules, step: int) -> None:
        self._contents, self._rules, self._step = contents, rules, step
        self._parameters = contents.parameters()
        items = {item for item, _ in self._parameters}
        if len(items) != 1:
            raise Refused(f"Megatron's files hold one model, and there are {', '.join(sorted(items)) or 'none'}: use --only")
        if len(contents.rows) > 1:
            raise Refused(
                f"Megatron's files hold one optimizer, and there are {', '.join(contents.rows)}: use --only or --skip"
            )
        (self._item,) = items
        self._deliveries: list[Delivery] = []
        self._whole: dict[tuple[str, str], Node] = {}
        self._padded = 0

    def run(self) -> SavedForm:
        shapes = [
            NamedShape(name, one.node.shape, one.true, item)
            for (item, name), states in self._parameters.items()
            for one in [states.get("value") or next(iter(states.values()))]
        ]
        size = prod(self._rules.scope.axes[axis] for axis in self._rules.chunks)
        ranks: dict[tuple[int, int], _RankUnder] = {}
        for one in place(self._rules, shapes):
            where = dict(one.coordinate)
            key = (where.get("pp", 0), where.get("tp", 0))
            ranks.setdefault(key, _RankUnder([{} for _ in range(size)])).placed.append(one)
        for pp in range(self._rules.scope.axes.get("pp", 1)):
            for tp in range(self._rules.scope.axes.get("tp", 1)):
                ranks.setdefault((pp, tp), _RankUnder([{} for _ in range(size)]))
        for key, rank in ranks.items():
            self._fill(key, rank)
        values, args, lost = self._values()
        if _PADDED in args and self._padded:
            args[_PADDED] = self._padded
        made = [
            NewRank(pp, tp, tuple(rank.chunks), rank.states, rank.groups, rank.masters, args, values)
            for (pp, tp), rank in sorted(ranks.items())
        ]
        return SavedForm(plan_megatron_legacy(made, step=self._step), tuple(self._deliveries), not_carried=tuple(lost))

    # -- tensors

    def _fill(self, key: tuple[int, int], rank: _RankUnder) -> None:
        for placed in rank.placed:
            rank.chunks[placed.chunk][placed.name] = self._tensor(key, placed, "value")
        counted_ = [(placed, (self._item, placed.parts[0].array)) for placed in self._ordered(rank)]
        for number, (placed, name) in enumerate(counted_):
            states = rank.states.setdefault(number, {})
            row = self._row(name)
            states.update({state: from_plain(value) for (kind, state), value in row.items() if kind == "scalar"})
            for state in self._parameters[name]:
                if state == "master":
                    rank.masters[number] = self._tensor(key, placed, state)
                elif state != "value":
                    states[state] = self._tensor(key, placed, state)
            if not states:
                del rank.states[number]
        rank.groups = tuple(self._groups([self._row(name) for _, name in counted_]))

    def _row(self, name: TableName) -> TableRow:
        item = optimizer_of(self._contents, name)
        return self._contents.rows.get(item, {}).get(name, {})

    def _ordered(self, rank: _RankUnder) -> tuple[PlacedTensor, ...]:
        """The rank's trained parameters as its optimizer counts them."""
        trained = [
            placed
            for placed in rank.placed
            if self._row((self._item, placed.parts[0].array)) or len(self._parameters[self._item, placed.parts[0].array]) > 1
        ]
        if not trained:
            return ()
        order = next(iter(self._rules.orders.values()), None)
        if order is None:
            raise Refused("the program of OUT has no order of the optimizer's parameters: add an order clause, or use --only")
        shapes = [LocalShape("model", str(k), placed.shape) for k, placed in enumerate(trained)]
        if isinstance(order.by, tuple):
            return tuple(trained[int(k)] for k in counted(order, self._rules, shapes, {}))
        by_name = {placed.name: placed for placed in trained}
        named = [LocalShape("model", placed.name, placed.shape) for placed in trained]
        return tuple(by_name[name] for name in counted(order, self._rules, named, {}))

    def _groups(self, rows: Sequence[TableRow]) -> Iterator[ParamGroup]:
        """Runs of parameters with the same options."""
        members: list[int] = []
        last: tuple[tuple[str, str], ...] | None = None
        options: dict[str, object] = {}
        for number, row in enumerate(rows):
            found = {key: value for (kind, key), value in row.items() if kind == "hyper"}
            code = tuple(sorted((key, value_digest(value)) for key, value in found.items()))
            if last is not None and code != last:
                yield ParamGroup("optimizer", tuple(members), options)
                members = []
            members.append(number)
            last, options = code, found
        if members:
            yield ParamGroup("optimizer", tuple(members), options)

    def _tensor(self, rank: tuple[int, int], placed: PlacedTensor, state: str) -> NewTensor:
        first = self._array(placed.parts[0].array, state)
        key = f"{rank[0]} {rank[1]} {placed.chunk} {placed.name} {state}"
        count = prod(placed.shape)
        if len(placed.parts) == 1:
            part = placed.parts[0]
            node = self._resized(part.array, state, part.held.whole, part.held.true)
            pieces = part.held.pieces
            whole = count == prod(node.shape) and len(pieces) == 1 and pieces[0].whole == pieces[0].local
            self._deliveries.append(Delivery(key, node, None if whole else pieces, count))
        else:
            terms = [
                Term(self._resized(part.array, state, part.held.whole, part.held.true), p.extents, p.whole, p.local)
                for part in placed.parts
                for p in part.held.pieces
            ]
            self._deliveries.append(Delivery(key, Mapped(placed.shape, first.node.dtype, tuple(terms)), None, count))
        return NewTensor(key, first.node.dtype, placed.shape)

    def _array(self, name: str, state: str) -> Array:
        return self._contents.arrays[ArrayId("params", self._item, name, state)]

    def _resized(self, name: str, state: str, shape: tuple[int, ...], true: tuple[int, ...] | None) -> Node:
        """The array in the shape that OUT pads it to; true rows are never dropped."""
        if true is not None:
            self._padded = shape[0]
        if (name, state) not in self._whole:
            array = self._array(name, state)
            if array.node.shape != shape and any(n < k for n, k in zip(shape, array.true or array.node.shape, strict=True)):
                raise Refused(f"{name} {state}: OUT has shape {shape}, the true one is {array.true or array.node.shape}")
            self._whole[name, state] = _padded(array, shape)
        return self._whole[name, state]

    # -- values

    def _values(self) -> tuple[dict[str, object], dict[str, object], list[NotCarried]]:
        values: dict[str, object] = {}
        args: dict[str, object] = {}
        lost: list[NotCarried] = []
        for pointer, value in self._contents.values.items():
            name = pointer[1:].replace("~1", "/").replace("~0", "~")
            if isinstance(value, ArrayReference):
                lost.append(NotCarried(pointer, "a tensor that is no state of a parameter"))
            elif name == "args" and isinstance(value, dict):
                inner = value.get("state") if CLASS in value else value
                args = dict(inner) if isinstance(inner, dict) else {}
            elif name.startswith("optimizer/"):
                beside = values.setdefault("optimizer", {})
                if isinstance(beside, dict):
                    beside[name.removeprefix("optimizer/")] = value
            else:
                values[name] = value
        for name in OF_STAGES if args and not self._stages_stay(args) else ():
            if args.get(name) not in (None, False):
                lost.append(NotCarried(f"/args/{name}", "it says how the source's layers were cut into stages"))
                args[name] = False if args[name] is True else None
        if not args:
            args = {name: value for name, value in self._rules.scope.constants.items() if name in _declared(self._rules)}
        lost += [NotCarried(str(one), "a tensor that is no state of a parameter") for one in _extras(self._contents)]
        return values, args, lost

    def _stages_stay(self, args: Mapping[str, object]) -> bool:
        """Whether OUT has its layers in the stages of the source."""
        scope = self._rules.scope
        given = any(isinstance(value, tuple) and name not in scope.own for name, value in scope.constants.items())
        virtual = prod(scope.axes[axis] for axis in self._rules.chunks)
        sizes = (args.get("pipeline_model_parallel_size"), args.get("virtual_pipeline_model_parallel_size") or 1)
        return not given and sizes == (scope.axes.get("pp", 1), virtual)


def _declared(rules: Rules) -> set[str]:
    return {need.name for need in needed(rules.program)}


def _extras(contents: Contents) -> list[ArrayId]:
    return [one for one in contents.arrays if one.section == "extra"]


def _padded(array: Array, shape: tuple[int, ...]) -> Node:
    """Stored rows stay where the size stays; where it changes only true rows go along, and the rest is zero."""
    if array.node.shape == shape:
        return array.node
    node = array.node
    if array.true is not None and any(n > k for n, k in zip(shape, array.node.shape, strict=True)):
        node = resized(node, array.true)
    return resized(node, shape)
