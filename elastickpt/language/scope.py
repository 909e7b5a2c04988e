"""What names of a program stand for: constants, axes and their sizes, sizes found from the files."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from elastickpt.errors import ProgramFault
from elastickpt.language import tree as t
from elastickpt.language.faults import fault

ConstantValue = int | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scope:
    """`axes` are all axes with their sizes; `sizes` what was found from shapes. `source`, `name`: for messages.

    `own`: lists that the program states itself, or finds in names: those of the mesh that they are of.
    """

    constants: Mapping[str, ConstantValue] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    name: str = ""
    own: Set[str] = frozenset()

    def fault(self, message: str, at: t.TextPlace) -> ProgramFault:
        return fault(message, at=at, source=self.source, name=self.name)

    def with_sizes(self, sizes: Mapping[str, int]) -> Scope:
        return replace(self, sizes={**self.sizes, **sizes})

    def size(self, name: str) -> int | None:
        """Of a constant or a size that was found; None if neither."""
        value = self.constants.get(name, self.sizes.get(name))
        return value if isinstance(value, int) else None

    def axis(self, name: str, at: t.TextPlace) -> int:
        if name not in self.axes:
            known = ", ".join(self.axes) or "none"
            raise self.fault(f"axis {name!r}: expected one of the mesh ({known})", at)
        return self.axes[name]

    def listed(self, name: str, ways: int, at: t.TextPlace) -> tuple[int, ...] | None:
        """The sizes of so many shares; None where the program's own list is that of another number of them."""
        value = self.constants.get(name)
        if value is None:
            raise self.fault(f"{name!r}: expected a constant that is a list of sizes, found none", at)
        sizes = (value,) if isinstance(value, int) else value
        return None if name in self.own and len(sizes) != ways else sizes

    def value(self, expr: t.Expr) -> int:
        """Raises ProgramFault for a constant that nobody gave, or a division with a remainder."""
        match expr:
            case t.Number(value):
                return value
            case t.AxisSize(axis):
                return self.axis(axis, expr.at)
            case t.Constant(name):
                found = self.constants.get(name)
                if isinstance(found, int):
                    return found
                raise self.fault(f"constant {name!r} is not given: declare it with 'needs', or give --set {name}=N", expr.at)
            case t.FunctionCall(function, arguments):
                values = [self.value(one) for one in arguments]
                if function == "ceil":
                    if values[1] < 1:
                        raise self.fault(f"ceil({values[0]}, {values[1]}): expected a divisor of at least 1", expr.at)
                    return -(-values[0] // values[1])
                return min(values) if function == "min" else max(values)
            case t.Arithmetic(sign, left, right):
                return self._operate(sign, self.value(left), self.value(right), expr.at)

    def _operate(self, sign: str, a: int, b: int, at: t.TextPlace) -> int:
        if sign == "+":
            return a + b
        if sign == "-":
            return a - b
        if sign == "*":
            return a * b
        if b < 1 or (sign == "/" and a % b):
            raise self.fault(f"{a} {sign} {b}: expected a division without remainder", at)
        return a // b if sign == "/" else a % b

    def holds(self, condition: t.Condition) -> bool:
        left = self.value(condition.left)
        if condition.right is None:
            return left != 0
        right = self.value(condition.right)
        return {
            "==": left == right,
            "!=": left != right,
            "<=": left <= right,
            ">=": left >= right,
            "<": left < right,
            ">": left > right,
        }[condition.sign or "=="]
