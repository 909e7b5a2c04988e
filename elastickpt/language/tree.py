"""A program of the conversion language as values. Places in the text are kept for messages and do not count as equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

HoldWord = Literal["same", "first", "last", "any", "average"]
TensorKind = Literal["matrices", "vectors", "all"]
Compare = Literal["==", "!=", "<=", ">=", "<", ">"]


@dataclass(frozen=True, slots=True)
class TextPlace:
    """Where something stands in a program: line and column from 1, and how many characters it has."""

    line: int
    column: int
    length: int = 1


NOWHERE = TextPlace(0, 0)
_AT = field(default=NOWHERE, compare=False, repr=False, kw_only=True)

# -- arithmetic --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Number:
    value: int
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Constant:
    name: str
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class AxisSize:
    """`|tp|`."""

    axis: str
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """`left sign right`; a division must leave no remainder."""

    sign: Literal["+", "-", "*", "/", "%"]
    left: Expr
    right: Expr
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """`min(a, b)`, `max(a, b)`, `ceil(a, b)`: a divided by b, rounded up."""

    function: str
    arguments: tuple[Expr, ...]
    at: TextPlace = _AT


Expr: TypeAlias = Number | Constant | AxisSize | Arithmetic | FunctionCall


@dataclass(frozen=True, slots=True)
class Condition:
    """`left sign right`, or `left` alone: not zero."""

    left: Expr
    sign: Compare | None = None
    right: Expr | None = None


# -- dimensions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Size:
    """A constant, or a size that is found from the files."""

    name: str
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Pad:
    """`pad(size, multiple)`: `size` true elements, filled up to a multiple; without one, to whatever the array has.

    `size` may be cut: then each share is filled up by itself.
    """

    size: Size | Cat | Cut
    multiple: Expr | None = None
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Product:
    """Factors, slowest first. `label` names the part of a sum, or the number that a stacked name carries."""

    factors: tuple[Factor, ...]
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Sum:
    """`(p + q)`: parts end to end; one part alone is a product in parentheses."""

    parts: tuple[Product, ...]
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Sizes:
    """Explicit sizes of shares: numbers, or the name of a list constant."""

    values: tuple[Expr, ...] | str


SplitMode: TypeAlias = Literal["even", "chunk", "balanced"] | Sizes


@dataclass(frozen=True, slots=True)
class Cut:
    """`inner/axis`: shares of what the rank has left of `inner`, by the rank's place on the axes, the first one slowest."""

    inner: Factor
    axes: tuple[str, ...]
    mode: SplitMode = "even"
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Deal:
    """`inner%axis`: dealt round-robin."""

    inner: Factor
    axis: str
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Cat:
    """`cat(order)`: the tensors of an order laid flat, one after the other; with `pad n` each filled up to a multiple of n."""

    order: str
    each: Expr | None = None
    at: TextPlace = _AT


Factor: TypeAlias = Size | Number | Pad | Sum | Cut | Deal | Cat

# -- names -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hole:
    """`{i}` an integer, the same in the whole; `{i: layers/pp}` an integer, of which a rank has a share; `{*n}` any text."""

    name: str
    share: Factor | None = None
    any_text: bool = False
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Pattern:
    """A name with holes: pieces of text and holes, in order."""

    pieces: tuple[str | Hole, ...]
    at: TextPlace = _AT

    @property
    def holes(self) -> tuple[Hole, ...]:
        return tuple(piece for piece in self.pieces if isinstance(piece, Hole))


# -- clauses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hold:
    """Which other ranks have it: `same tp`, `first pp`, `last pp`, `any dp`, `average dp`."""

    word: HoldWord
    axes: tuple[str, ...]
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Flag:
    word: Literal["optional", "drop", "equal"]
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class TiedClause:
    """It is the whole array of that name once more."""

    to: Pattern
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored is the whole's divided by `by`; of other states than the value, to the exponent stated."""

    by: Expr
    exponents: tuple[tuple[str, int], ...] = ()
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class If:
    condition: Condition
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class CastClause:
    dtype: str
    at: TextPlace = _AT


Clause: TypeAlias = Hold | Flag | TiedClause | Stored | If | CastClause

# -- statements --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SizeList:
    """A list of sizes: those of as many shares; None where names in the files tell them."""

    values: tuple[Expr, ...] | None


@dataclass(frozen=True, slots=True)
class Need:
    """A constant, by its name; files may state it under others; without a default somebody must give it."""

    name: str
    default: Expr | SizeList | None = None
    others: tuple[str, ...] = ()
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Needs:
    needs: tuple[Need, ...]


@dataclass(frozen=True, slots=True)
class Let:
    name: str
    value: Expr
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class MeshLine:
    """`mesh dense = pp, tp 4`: axes, the first one slowest, with the sizes that hold where nobody gives others."""

    name: str
    axes: tuple[str, ...]
    sizes: tuple[int | None, ...]
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Split:
    """An axis as two: `split tp = kv, copy where |kv| = min(|tp|, groups)`; the first one slowest."""

    axis: str
    into: tuple[str, str]
    sized: str
    size: Expr
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Chunks:
    """An axis inside one rank: parts that it holds side by side, as virtual stages are."""

    axis: str
    size: Expr
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class On:
    mesh: str
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class OrderMember:
    """A name of an order; `dims` where it says the shape of what it counts, as of tensors that no file holds by themselves."""

    name: Pattern
    dims: tuple[Factor, ...] | None = None
    begins: bool = False  # a param group


@dataclass(frozen=True, slots=True)
class Names:
    """An order that is written out."""

    members: tuple[OrderMember, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """In which order a file counts parameters: a listing of the files, kinds in model order, or names."""

    name: str
    by: str | tuple[TensorKind, ...] | Names
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class RuleLine:
    """A rule, a block of rules whose names begin alike, a map (with an arrow), or a part of a map.

    `dims` None: a block, or a rule that drops; `()` no axes; `"..."` whatever axes there are.
    """

    pattern: Pattern
    whole: Pattern | None = None
    dims: tuple[Factor, ...] | Literal["..."] | None = None
    clauses: tuple[Clause, ...] = ()
    arrow: Arrow | None = None
    body: tuple[RuleLine, ...] = ()
    at: TextPlace = _AT


@dataclass(frozen=True, slots=True)
class Arrow:
    pattern: Pattern
    dims: tuple[Factor, ...] | Literal["..."] | None = None
    clauses: tuple[Clause, ...] = ()


@dataclass(frozen=True, slots=True)
class Within:
    """The lines of a container: keys that begin with one of these patterns."""

    containers: tuple[Pattern, ...]
    body: tuple[RuleLine, ...]
    at: TextPlace = _AT


Statement: TypeAlias = Needs | Let | MeshLine | Split | Chunks | On | Order | Within | RuleLine


@dataclass(frozen=True, slots=True)
class Program:
    version: int
    statements: tuple[Statement, ...]
    source: str = field(default="", compare=False, repr=False)  # the text, for messages
    name: str = field(default="", compare=False, repr=False)  # of the file, for messages
