"""What `inspect` shows to people: a header, the arrays as a tree or a table, and whatever else was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from elastickpt.cli.facts import ArrayFact, Facts, OptimizerFact, Setting, approximate_since
from elastickpt.cli.grid import Column, GridLine, Row, Span, grid
from elastickpt.cli.nametree import NameNode, collapsed, joined, name_tree
from elastickpt.cli.text import (
    nbytes_text,
    plural,
    printable,
    ranges_text,
    shape_text,
    time_text,
    value_text,
)
from elastickpt.format.arrays import Mesh
from elastickpt.format.records import Item
from elastickpt.format.values import Value

SHOWN_NAMES = 3  # parameters of an optimizer's group that are named

_BESIDE = (  # what stands beside an array's name
    Column("shape", style="cyan"),
    Column("type"),
    Column("states", style="green", flexible=True),
    Column("bytes", "right"),
    Column("chunks", optional=1),
    Column("writers", optional=3),
    Column("placement", style="magenta", optional=2),
)
_PAIR = (Column("", style="dim"), Column("", flexible=True))


def heading(text: str, *, beside: str = "") -> GridLine:
    """A title, and what is said about it."""
    return (Span(text, "bold"), Span(f"  {beside}" if beside else "", "dim"))


def header(path: str, facts: Facts, *, width: int | None) -> Iterator[GridLine]:
    """The checkpoint as a whole: step, time, ranks, meshes, items, totals, who wrote it."""
    manifest = facts.manifest
    yield heading(printable(path))
    pairs = [
        *((("folder", facts.place),) if "@" in path else ()),
        ("step", "not recorded" if manifest.step is None else f"{manifest.step:,}"),
        ("saved", time_text(manifest.time)),
        ("format", f"version {manifest.version}, placement {manifest.placement}"),
        ("written by", ", ".join(f"{name} {version}" for name, version in manifest.versions)),
        ("world size", plural(manifest.world_size, "rank")),
        *((f"mesh {mesh.name}", _mesh_text(mesh)) for mesh in manifest.meshes),
        ("items", ", ".join(map(_item_text, manifest.items))),
        ("parameters", f"{facts.elements:,} elements in {plural(facts.parameters, 'parameter')} and buffers"),
        ("arrays", f"{plural(len(facts.every), 'array')} in {plural(facts.chunks, 'chunk')}"),
        ("bytes", f"{facts.nbytes:,} ({nbytes_text(facts.nbytes)})"),
        ("values", f"{len(facts.values()):,} replicated"),
        *(("tied", " = ".join(f"{item}/{name}" for item, name in group)) for group in manifest.tied),
        *(("base", base.uri) for base in manifest.bases),
        *((("state", f"approximate since step {since:,}"),) if (since := approximate_since(manifest)) is not None else ()),
    ]
    if facts.filtered:
        chosen = sum(fact.nbytes for fact in facts.arrays)
        pairs.append(("chosen", f"{len(facts.arrays):,} of {plural(len(facts.every), 'array')}, {nbytes_text(chosen)}"))
    yield from grid(_PAIR, [Row(tuple(map(printable, pair)), "  ") for pair in pairs], width=width, titled=False)


def _mesh_text(mesh: Mesh) -> str:
    axes = " × ".join(f"{axis}={size}" for axis, size in zip(mesh.axes, mesh.sizes, strict=True))
    return f"{axes} over ranks {ranges_text(mesh.ranks)}"


def _item_text(item: Item) -> str:
    said = item.kind if item.kind == "values" or not item.type else f"{item.kind} {item.type}"
    return f"{item.name} ({said})"


def array_tree(facts: Facts, *, collapse: bool, width: int | None) -> Iterator[GridLine]:
    """The arrays by item and name; a row's bytes are those of all arrays that it stands for."""
    by_item: dict[tuple[str, str], list[ArrayFact]] = {}
    for fact in facts.arrays:
        by_item.setdefault((fact.id.section, fact.id.item), []).append(fact)
    place = {item.name: k for k, item in enumerate(facts.manifest.items)}
    rows: list[Row] = []
    for (section, item), arrays in sorted(by_item.items(), key=lambda pair: place.get(pair[0][1], len(place))):
        tree = name_tree(item, arrays)
        tree = joined(collapsed(tree) if collapse else tree, separator="." if section == "params" else "/")
        rows += _node_rows(tree, ("", ""), style="bold")
    yield from grid((Column("name"), *_BESIDE), rows, width=width)


def _node_rows(node: NameNode, guides: tuple[str, str], *, style: str = "") -> Iterator[Row]:
    """`guides` stand before this node's own row, and before everything below it."""
    own, below = guides
    inside = "│   " if node.children else ""
    label = printable(node.label) or '""'
    if not node.states:
        nbytes = nbytes_text(sum(fact.nbytes for fact in node.facts()))
        yield Row((label, "", "", "", nbytes, "", "", ""), own, below + inside, style)
    for number, (states, facts) in enumerate(_alike(node.states)):
        cells = (label if number == 0 else "", *_beside(facts, " ".join(states)))
        yield Row(cells, own if number == 0 else below + inside, below + inside, style)
    last = len(node.children) - 1
    for number, child in enumerate(node.children.values()):
        guide, rest = ("└── ", "    ") if number == last else ("├── ", "│   ")
        yield from _node_rows(child, (below + guide, below + rest))


def _alike(states: Mapping[str, Sequence[ArrayFact]]) -> list[tuple[list[str], list[ArrayFact]]]:
    """States that differ in nothing but their name and writers stand in one row; `value` comes first."""
    rows: dict[object, tuple[list[str], list[ArrayFact]]] = {}
    for state in sorted(states, key=lambda state: (state != "value", state)):
        first = states[state][0]
        like = (first.record.spec.shape, first.record.spec.dtype, first.record.chunk_shape, first.mesh, first.placements)
        names, facts = rows.setdefault(like, ([], []))
        names.append(printable(state))
        facts.extend(states[state])
    return list(rows.values())


def array_table(facts: Facts, *, width: int | None) -> Iterator[GridLine]:
    """One row an array, in the order of keys."""
    rows = [Row((_name(fact), *_beside([fact], printable(fact.id.state)))) for fact in facts.arrays]
    columns = [Column("state", style="green") if column.title == "states" else column for column in _BESIDE]
    yield from grid((Column("array", style="bold"), *columns), rows, width=width)


def _name(fact: ArrayFact) -> str:
    return printable(f"{fact.id.item}/{fact.id.name}" if fact.id.name else fact.id.item)


def _beside(facts: Sequence[ArrayFact], states: str) -> tuple[str, ...]:
    """The cells beside a name, for arrays that differ in name, state and writers only."""
    first = facts[0]
    shape = first.record.spec.shape
    chunks = "1" if first.chunks == 1 else f"{first.chunks:,} of {shape_text(first.record.chunk_shape)}"
    placed = zip(first.axes, first.placements or (), strict=True)
    return (
        shape_text(shape),
        _type_text(first),
        states,
        nbytes_text(sum(fact.nbytes for fact in facts)),
        chunks,
        ranges_text(writer for fact in facts for writer in fact.record.writers),
        " ".join(f"{printable(axis)}:{placement}" for axis, placement in placed),
    )


def _type_text(fact: ArrayFact) -> str:
    stored = dict(fact.record.attributes).get("stored_as")
    return fact.record.spec.dtype if stored is None else f"{fact.record.spec.dtype} ({value_text(stored)})"


def optimizer_lines(facts: Facts, *, width: int | None) -> Iterator[GridLine]:
    """Every optimizer: what all its parameters share, then a row for each distinct set of settings."""
    for optimizer in facts.optimizers:
        yield ()
        yield heading(printable(optimizer.item), beside=_count_text(optimizer))
        shared = ", ".join(_setting_text(key, value) for key, value in optimizer.shared.items())
        if shared:
            yield from grid(_PAIR, [Row(("shared", shared), "  ")], width=width, titled=False)
        if len(optimizer.groups) > 1:
            yield from _groups(optimizer, width=width)


def _count_text(optimizer: OptimizerFact) -> str:
    return f"{plural(optimizer.parameters, 'parameter')}, {plural(len(optimizer.groups), 'group')} of settings"


def _setting_text(key: Setting, value: Value) -> str:
    return f"{_setting_name(key)} {value_text(value)}"


def _setting_name(key: Setting) -> str:
    return printable(key[1])


def _groups(optimizer: OptimizerFact, *, width: int | None) -> Iterator[GridLine]:
    keys = list(dict.fromkeys(key for group in optimizer.groups for key in group.values))
    several = len({item for group in optimizer.groups for item, _ in group.parameters}) > 1
    rows = []
    for group in optimizer.groups:
        names = [printable(f"{item}/{name}" if several else name) for item, name in group.parameters[:SHOWN_NAMES]]
        more = len(group.parameters) - len(names)
        cells = [value_text(group.values[key]) if key in group.values else "–" for key in keys]
        rows.append(
            Row((f"{len(group.parameters):,}", *cells, ", ".join(names) + (f", … {more:,} more" if more else "")), "  ")
        )
    columns = (Column("  parameters"), *(Column(_setting_name(key), "right") for key in keys), Column("which", flexible=True))
    yield from grid(columns, rows, width=width)


def value_lines(facts: Facts, *, width: int | None) -> Iterator[GridLine]:
    """All values: the replicated ones, then every writer's own."""
    yield from _values("values", facts.values(), width=width)
    for writer in range(len(facts.manifest.fragments)):
        own = facts.values_of(writer)
        if own:
            yield from _values(f"values of rank {writer}", own, width=width)


def _values(title: str, values: Iterable[tuple[str, Value]], *, width: int | None) -> Iterator[GridLine]:
    rows = [Row((printable(place), value_text(value)), "  ") for place, value in values]
    yield ()
    yield heading(title, beside="" if rows else "none")
    yield from grid((Column("", style=""), Column("", style="cyan", flexible=True)), rows, width=width, titled=False)


def writer_lines(facts: Facts, *, width: int | None) -> Iterator[GridLine]:
    """One row a writer: what it stored."""
    yield ()
    yield heading("writers")
    columns = (
        Column("  writer"),
        *(Column(title, "right") for title in ("arrays", "pieces", "bytes", "block", "own values")),
        Column("file bytes", "right", optional=1),
        Column("fragment file", optional=2),
    )
    rows = [
        Row(
            (
                str(w.writer),
                f"{w.arrays:,}",
                f"{w.pieces:,}",
                nbytes_text(w.nbytes),
                nbytes_text(w.block_nbytes),
                f"{w.values:,}",
                nbytes_text(w.file_nbytes),
                printable(w.path),
            ),
            "  ",
        )
        for w in facts.writers()
    ]
    yield from grid(columns, rows, width=width)


def fragment_lines(facts: Facts, *, width: int | None) -> Iterator[GridLine]:
    """One row a stored piece of the arrays shown: whose, which elements, where they lie."""
    yield ()
    yield heading("stored pieces")
    columns = (
        Column("  array"),
        Column("writer", "right"),
        Column("box", style="cyan"),
        Column("bytes", "right"),
        Column("offset", "right"),
        Column("rows", "right", optional=2),
        Column("file", optional=1),
    )
    rows = [
        Row(
            (
                printable(str(piece.array)),
                str(piece.writer),
                _box_text(piece.box.start, piece.box.stop),
                f"{piece.nbytes:,}",
                f"{piece.offset:,}",
                _rows_text(piece.nbytes, piece.row_nbytes, piece.row_stride),
                printable(piece.file),
            ),
            "  ",
        )
        for piece in sorted(facts.pieces(), key=lambda piece: (piece.array, piece.box))
    ]
    yield from grid(columns, rows, width=width)


def _box_text(start: Sequence[int], stop: Sequence[int]) -> str:
    return ",".join(f"{low}:{high}" for low, high in zip(start, stop, strict=True)) or "scalar"


def _rows_text(nbytes: int, row_nbytes: int, row_stride: int) -> str:
    return "" if row_nbytes == nbytes else f"{nbytes // row_nbytes:,} × {row_nbytes:,} every {row_stride:,}"
