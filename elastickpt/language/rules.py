"""A program, flattened: constants resolved, meshes, orders, and one rule for each kind of local tensor.

Blocks only shorten names: a rule here has its whole name and all clauses that hold for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from elastickpt.errors import LimitExceeded
from elastickpt.language import tree as t
from elastickpt.language.labels import labels_of
from elastickpt.language.patterns import joined, regex_of
from elastickpt.language.scope import ConstantValue, Scope

MAX_RANKS = 1 << 16


@dataclass(frozen=True, slots=True)
class Rule:
    """How tensors of one kind of name lie in the whole.

    `path` are the places of the enclosing blocks and of itself, each with the holes that its name adds: the order in which a
    model has its tensors is that of the program, numbers counting within their block.
    """

    containers: tuple[t.Pattern, ...]
    pattern: t.Pattern
    whole: t.Pattern
    dims: tuple[t.Factor, ...] | str
    mesh: str
    clauses: tuple[t.Clause, ...]
    path: tuple[tuple[int, tuple[str, ...]], ...]
    at: t.TextPlace

    def flag(self, word: str) -> bool:
        return any(isinstance(one, t.Flag) and one.word == word for one in self.clauses)

    @property
    def holds(self) -> tuple[t.Hold, ...]:
        return tuple(one for one in self.clauses if isinstance(one, t.Hold))

    @property
    def tied(self) -> t.Pattern | None:
        return next((one.to for one in self.clauses if isinstance(one, t.TiedClause)), None)

    @property
    def stored(self) -> t.Stored | None:
        return next((one for one in self.clauses if isinstance(one, t.Stored)), None)

    @property
    def averaged(self) -> tuple[str, ...]:
        return tuple(axis for hold in self.holds if hold.word == "average" for axis in hold.axes)


@dataclass(frozen=True, slots=True)
class Rules:
    """A program with its constants and the sizes of its axes."""

    program: t.Program
    scope: Scope
    meshes: Mapping[str, tuple[str, ...]]
    splits: tuple[t.Split, ...]
    chunks: tuple[str, ...]
    orders: Mapping[str, t.Order]
    rules: tuple[Rule, ...]

    def block_of(self, container: str) -> t.TextPlace:
        """Where a rule for tensors of a container would stand: its block, or the last one."""
        blocks = [one for one in self.program.statements if isinstance(one, t.Within)]
        own = [one for one in blocks if any(regex_of(pattern).fullmatch(container) for pattern in one.containers)]
        return next((one.at for one in (*own, *reversed(blocks))), t.NOWHERE)

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes of all meshes, each once, in the order of the text."""
        return tuple(dict.fromkeys(axis for axes in self.meshes.values() for axis in axes))

    @property
    def rank_axes(self) -> tuple[str, ...]:
        """The axes that tell ranks apart: those of the first mesh."""
        return next(iter(self.meshes.values()), ())

    def coordinate(self, place: Mapping[str, int]) -> dict[str, int]:
        """A rank's place on all axes, those of further meshes and of splits too.

        Meshes stand over the same ranks: where a rank's place on an axis is not given, its number in the first mesh tells it.
        """
        found = dict(place)
        number = 0
        for axis in self.rank_axes:
            number = number * self.scope.axes[axis] + place.get(axis, 0)
        for axes in self.meshes.values():
            left = number
            for axis in reversed(axes):
                left, index = divmod(left, self.scope.axes[axis])
                found.setdefault(axis, index)
        for split in self.splits:
            fast = self.scope.axes[split.into[1]]
            found[split.into[0]], found[split.into[1]] = divmod(found.get(split.axis, 0), fast)
        return found


def needed(program: t.Program) -> tuple[t.Need, ...]:
    """The constants that a program declares, in its order."""
    return tuple(need for one in program.statements if isinstance(one, t.Needs) for need in one.needs)


def sizes_of(program: t.Program) -> dict[str, int]:
    """The sizes that a program states of its axes itself."""
    lines = (one for one in program.statements if isinstance(one, t.MeshLine))
    return {axis: size for line in lines for axis, size in zip(line.axes, line.sizes, strict=True) if size is not None}


def axes_of(program: t.Program) -> tuple[str, ...]:
    """All axes of all meshes of a program, each once."""
    lines = (one for one in program.statements if isinstance(one, t.MeshLine))
    return tuple(dict.fromkeys(axis for line in lines for axis in line.axes))


def resolve(program: t.Program, constants: Mapping[str, ConstantValue | None], sizes: Mapping[str, int]) -> Rules:
    """The program's rules under these constants and mesh sizes.

    Constants that no `needs` declares are no concern of the program; one that is None counts as not given. Raises ProgramFault
    for a constant that is missing, axes that are not the program's, and whatever the program says of itself that is wrong.
    """
    scope = Scope({}, {}, {}, program.source, program.name)
    program, axes = _with_chunks(program, sizes), axes_of(program)
    meshes = [one.at for one in program.statements if isinstance(one, t.MeshLine)]
    at = meshes[0] if meshes else t.NOWHERE
    for axis, size in sizes.items():
        if axis not in (known := (*axes, *(one.axis for one in program.statements if isinstance(one, t.Chunks)))):
            raise scope.fault(f"mesh axis {axis!r}: expected one of {', '.join(known) or 'none'}", at)
        if size < 1:
            raise scope.fault(f"mesh axis {axis!r} of size {size}: expected at least 1", at)
    stated = sizes_of(program)
    scope = replace(scope, axes={axis: sizes.get(axis, stated.get(axis, 1)) for axis in axes})
    return _Resolving(program, scope, constants).run()


def _with_chunks(program: t.Program, sizes: Mapping[str, int]) -> t.Program:
    """The program with these sizes of its axes inside a rank."""
    made = (
        replace(one, size=t.Number(sizes[one.axis])) if isinstance(one, t.Chunks) and one.axis in sizes else one
        for one in program.statements
    )
    return replace(program, statements=tuple(made))


def declared(program: t.Program, constants: Mapping[str, ConstantValue | None]) -> Scope:
    """What the names of a name map stand for: its constants and nothing else. Raises ProgramFault as `resolve`."""
    only = tuple(one for one in program.statements if isinstance(one, t.Needs | t.Let))
    return _Resolving(replace(program, statements=only), Scope(source=program.source, name=program.name), constants).run().scope


class _Resolving:
    def __init__(self, program: t.Program, scope: Scope, given: Mapping[str, ConstantValue | None]) -> None:
        self._program, self._scope, self._given = program, scope, given
        self._meshes: dict[str, tuple[str, ...]] = {}
        self._splits: list[t.Split] = []
        self._chunks: list[str] = []
        self._orders: dict[str, t.Order] = {}
        self._rules: list[Rule] = []
        self._mesh = ""

    def run(self) -> Rules:
        for statement in self._program.statements:
            self._take(statement)
        self._check_meshes()
        return Rules(
            self._program,
            self._scope,
            self._meshes,
            tuple(self._splits),
            tuple(self._chunks),
            self._orders,
            tuple(self._rules),
        )

    def _check_meshes(self) -> None:
        """Meshes are of one size, and no larger than the limit. [LANG-19]"""
        sizes = {name: prod(self._scope.axes[axis] for axis in axes) for name, axes in self._meshes.items()}
        first = next(iter(sizes.values()), 1)
        for line in self._program.statements:
            if isinstance(line, t.MeshLine) and sizes[line.name] != first:
                said = (
                    f"mesh {line.name!r} has {sizes[line.name]} places, the first one {first}: they stand over the same ranks"
                )
                raise self._scope.fault(said, line.at)
        if first > MAX_RANKS:
            raise LimitExceeded(f"{self._program.name}: a mesh of {first} places, the limit is {MAX_RANKS}")

    def _take(self, statement: t.Statement) -> None:
        match statement:
            case t.Needs(needs):
                for need in needs:
                    self._constant(need.name, self._needed(need), need.at)
            case t.Let(name, value):
                self._constant(name, self._scope.value(value), statement.at)
            case t.MeshLine(name, axes):
                if name in self._meshes or len(set(axes)) != len(axes):
                    raise self._scope.fault(f"mesh {name!r} stands twice, or has an axis twice", statement.at)
                self._meshes[name], self._mesh = axes, self._mesh or name
            case t.Split():
                self._split(statement)
            case t.Chunks(axis, size):
                self._chunks.append(axis)
                self._axis(axis, self._scope.value(size), statement.at)
            case t.On(mesh):
                if mesh not in self._meshes:
                    raise self._scope.fault(f"mesh {mesh!r}: expected one of {', '.join(self._meshes)}", statement.at)
                self._mesh = mesh
            case t.Order(name):
                if name in self._orders:
                    raise self._scope.fault(f"order {name!r} stands twice", statement.at)
                self._orders[name] = statement
            case t.Within(containers, body):
                for line in body:
                    self._rules.extend(self._flattened(line, containers))
            case t.RuleLine():
                raise self._scope.fault("a map stands in a program: rules stand below 'in CONTAINER'", statement.at)

    def _needed(self, need: t.Need) -> ConstantValue:
        for name in (need.name, *need.others):
            given = self._given.get(name)
            if given is not None:
                return given
        match need.default:
            case None:
                raise self._scope.fault(f"constant {need.name!r} is in no file: give --set {need.name}=N", need.at)
            case t.SizeList(values):
                self._scope = replace(self._scope, own={*self._scope.own, need.name})
                return tuple(map(self._scope.value, values or ()))
            case _:
                return self._scope.value(need.default)

    def _constant(self, name: str, value: ConstantValue, at: t.TextPlace) -> None:
        if name in self._scope.constants:
            raise self._scope.fault(f"constant {name!r} is given twice", at)
        self._scope = replace(self._scope, constants={**self._scope.constants, name: value})

    def _axis(self, name: str, size: int, at: t.TextPlace) -> None:
        if name in self._scope.axes:
            raise self._scope.fault(f"axis {name!r} stands twice", at)
        if size < 1:
            raise self._scope.fault(f"axis {name!r} of size {size}: expected at least 1", at)
        self._scope = replace(self._scope, axes={**self._scope.axes, name: size})

    def _split(self, split: t.Split) -> None:
        whole, size = self._scope.axis(split.axis, split.at), self._scope.value(split.size)
        if split.sized not in split.into:
            raise self._scope.fault(f"|{split.sized}|: expected one of {' and '.join(split.into)}", split.at)
        if size < 1 or whole % size:
            raise self._scope.fault(f"axis {split.axis!r} of size {whole} is no multiple of {size}", split.at)
        for axis in split.into:
            self._axis(axis, size if axis == split.sized else whole // size, split.at)
        self._splits.append(split)

    # -- rules

    def _flattened(self, line: t.RuleLine, containers: tuple[t.Pattern, ...], outer: Rule | None = None) -> Iterator[Rule]:
        if line.arrow is not None:
            raise self._scope.fault("a map stands in a program: maps are files of their own, for --names", line.at)
        if not all(self._scope.holds(one.condition) for one in line.clauses if isinstance(one, t.If)):
            return
        pattern, clauses = line.pattern, line.clauses
        whole = line.whole or line.pattern
        path: tuple[tuple[int, tuple[str, ...]], ...] = ()
        if outer is not None:
            pattern, whole = joined(outer.pattern, pattern), joined(outer.whole, whole)
            clauses, path = (*outer.clauses, *clauses), outer.path
            for name, at in ((pattern, line.pattern.at), (whole, (line.whole or line.pattern).at)):
                if len({hole.name for hole in name.holes}) < len(name.holes):
                    raise self._scope.fault("a hole stands twice: inside a block a name stands behind that of the block", at)
        path = (*path, (line.at.line, tuple(hole.name for hole in line.pattern.holes)))
        own: tuple[t.Factor, ...] | str = () if line.dims is None else line.dims
        rule = Rule(containers, pattern, whole, own, self._mesh, clauses, path, line.at)
        if line.body:
            if line.dims is not None:
                raise self._scope.fault("a block has no dimensions of its own", line.at)
            for inner in line.body:
                yield from self._flattened(inner, containers, rule)
            return
        if line.dims is None and not rule.flag("drop"):
            raise self._scope.fault("expected dimensions, as in 'name  out/tp in', or 'drop'", line.at)
        self._check(rule)
        yield rule

    def _check(self, rule: Rule) -> None:
        """What can be seen without any file: its axes, its holes."""
        for hold in rule.holds:
            for axis in hold.axes:
                self._scope.axis(axis, hold.at)
        names = {hole.name for hole in rule.pattern.holes}
        labels = set(labels_of(rule.dims))
        for hole in (rule.tied or rule.whole).holes:
            if hole.name not in names | labels:
                raise self._scope.fault(f"{{{hole.name}}} is neither a hole of the name nor a label of a dimension", hole.at)
        if not rule.flag("drop"):
            require_mention(rule, self)

    @property
    def scope(self) -> Scope:
        return self._scope

    @property
    def meshes(self) -> Mapping[str, tuple[str, ...]]:
        return self._meshes

    @property
    def splits(self) -> tuple[t.Split, ...]:
        return tuple(self._splits)

    @property
    def chunks(self) -> tuple[str, ...]:
        return tuple(self._chunks)


# -- axes that a rule mentions -----------------------------------------------------------------------------------------


def _paths(factor: t.Factor) -> list[tuple[str, ...]]:
    """The axes that each part of a factor depends on, as often as they cut it: one entry for each way through its sums."""
    match factor:
        case t.Cut(inner, axes):
            return [(*path, *axes) for path in _paths(inner)]
        case t.Deal(inner, axis):
            return [(*path, axis) for path in _paths(inner)]
        case t.Pad(size):
            return _paths(size)
        case t.Sum(parts):
            return [path for part in parts for path in _across(part.factors)]
        case _:
            return [()]


def _across(factors: tuple[t.Factor, ...]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()]
    for factor in factors:
        found = [(*one, *other) for one in found for other in _paths(factor)]
    return list(dict.fromkeys(found))


def require_mention(rule: Rule, known: Rules | _Resolving) -> None:
    """Raises ProgramFault unless the rule says of every axis of its mesh, and of chunks, what it means, part by part."""
    said = {axis for hold in rule.holds for axis in hold.axes}
    numbered = [axis for hole in rule.pattern.holes if hole.share is not None for path in _paths(hole.share) for axis in path]
    mesh = known.meshes.get(rule.mesh, ())
    parts = _across(rule.dims) if isinstance(rule.dims, tuple) else [()]
    for path in parts:
        cuts = [*path, *numbered]
        twice = next((axis for k, axis in enumerate(cuts) if axis in cuts[:k]), None)
        if twice is not None:
            raise known.scope.fault(f"axis {twice!r} cuts it twice: parts of the whole would be on no rank", rule.at)
        mentioned = {*cuts, *said}
        for split in known.splits:
            if set(split.into) <= mentioned:
                mentioned.add(split.axis)
        for axis in (*mesh, *known.chunks):
            if axis not in mentioned:
                raise known.scope.fault(
                    f"axis {axis!r} is not mentioned: cut a dimension along it, or say 'same {axis}' where all its ranks hold "
                    f"the same, 'first {axis}' or 'last {axis}' where only one has it",
                    rule.at,
                )


def ways(axes: Mapping[str, int]) -> int:
    """How many places there are on these axes."""
    return prod(axes.values())
