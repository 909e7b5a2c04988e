"""The arrays of an item as a tree of their names, in which numbered siblings of equal structure are one. [CLI-23]

layers.0.up.weight  layers.0.up.bias  layers.1.up.weight  layers.1.up.bias  norm.weight
-->  layers.{0..1}.up -- weight, bias;  norm.weight
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from elastickpt.cli.facts import ArrayFact
from elastickpt.cli.text import ranges_text

MAX_LEVELS = 64  # a name with more parts keeps its rest whole
MAX_DIGITS = 9  # digits of a sibling's number; longer ones are names


@dataclass(slots=True, eq=False)
class NameNode:
    """A part of names. `children` are by their own name, or that of the first where siblings became one; `label` shows.

    `states` are the arrays that stand here, by state.
    """

    label: str
    children: dict[str, NameNode] = field(default_factory=dict)
    states: dict[str, list[ArrayFact]] = field(default_factory=dict)
    structure: int | None = None  # once it is known; see `_Structures`

    def facts(self) -> Iterator[ArrayFact]:
        """All arrays here and below."""
        for facts in self.states.values():
            yield from facts
        for child in self.children.values():
            yield from child.facts()


def name_tree(label: str, arrays: Iterable[ArrayFact]) -> NameNode:
    """The tree of one item's arrays: FQNs are parted at dots, the pointers of extra arrays at slashes."""
    root = NameNode(label)
    for fact in arrays:
        node = root
        separator = "." if fact.id.section == "params" else "/"
        for part in fact.id.name.split(separator, MAX_LEVELS) if fact.id.name else ():
            node = node.children.setdefault(part, NameNode(part))
        node.states.setdefault(fact.id.state, []).append(fact)
    return root


def collapsed(node: NameNode) -> NameNode:
    """The tree with numbered siblings of equal structure as one, at every level."""
    return _collapsed(node, _Structures())


def joined(node: NameNode, *, separator: str) -> NameNode:
    """The tree with every chain of single children below it as one node, and siblings in the order of people."""
    below = {name: _chain(joined(child, separator=separator), separator) for name, child in node.children.items()}
    ordered = sorted(below.items(), key=lambda pair: _human_order(pair[1].label))
    return NameNode(node.label, dict(ordered), node.states)


def _chain(node: NameNode, separator: str) -> NameNode:
    if len(node.children) != 1 or node.states:
        return node
    (only,) = node.children.values()
    return NameNode(f"{node.label}{separator}{only.label}", only.children, only.states)


class _Structures:
    """A number for each structure: what stands below a node, whatever its own name and writers are."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def of(self, node: NameNode) -> int:
        if node.structure is None:
            children = tuple(sorted((name, self.of(child)) for name, child in node.children.items()))
            states = tuple(sorted((state, tuple(map(_like, facts))) for state, facts in node.states.items()))
            node.structure = self._numbers.setdefault((children, states), len(self._numbers))
        return node.structure


def _like(fact: ArrayFact) -> tuple[object, ...]:
    spec = fact.record.spec
    return spec.shape, spec.dtype, fact.record.chunk_shape, fact.mesh or "", fact.placements or ()


def _collapsed(node: NameNode, structures: _Structures) -> NameNode:
    same: dict[object, list[str]] = {}
    for name, child in node.children.items():
        same.setdefault(structures.of(child) if _is_number(name) else name, []).append(name)
    found = NameNode(node.label, {}, node.states)
    for names in same.values():
        label = names[0] if len(names) == 1 else f"{{{ranges_text(map(int, names), to='..')}}}"
        found.children[names[0]] = _collapsed(_merged([node.children[name] for name in names], label), structures)
    return found


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= MAX_DIGITS and str(int(name)) == name


def _merged(nodes: list[NameNode], label: str) -> NameNode:
    """Nodes of equal structure as one, which holds the arrays of all."""
    if len(nodes) == 1:
        return nodes[0]
    first = nodes[0]
    children = {name: _merged([node.children[name] for node in nodes], name) for name in first.children}
    states = {state: [fact for node in nodes for fact in node.states[state]] for state in first.states}
    return NameNode(label, children, states)


def _human_order(label: str) -> tuple[tuple[int, int, str], ...]:
    """Numbers by value: "2" before "10", and a collapsed "{0..31}" where its first number belongs."""
    parts = label.replace("{", "").replace("}", "").replace(",", ".").split(".")
    return tuple((0, int(part), "") if _is_number(part) else (1, 0, part) for part in parts)
