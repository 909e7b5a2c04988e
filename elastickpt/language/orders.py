"""In which order a file counts a rank's parameters: by kinds, by names, or by a listing of the files. [LANG-25, LANG-26]"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elastickpt.language import tree as t
from elastickpt.language.holders import LocalShape
from elastickpt.language.printer import pattern_text
from elastickpt.language.rules import Rules

_AXES: dict[t.TensorKind, range] = {"matrices": range(2, 33), "vectors": range(2), "all": range(33)}


def plain_name(pattern: t.Pattern) -> str:
    """The text of a name without holes."""
    return pattern_text(pattern).strip('"')


def written_names(order: t.Order) -> tuple[str, ...]:
    """The names of an order that is written out; none of another one."""
    return tuple(name for group in written_groups(order) for name in group)


def written_groups(order: t.Order) -> tuple[tuple[str, ...], ...]:
    """The same, group by group."""
    groups: list[list[str]] = []
    for one in order.by.members if isinstance(order.by, t.Names) else ():
        if one.begins or not groups:
            groups.append([])
        groups[-1].append(plain_name(one.name))
    return tuple(map(tuple, groups))


def counted(
    order: t.Order, rules: Rules, values: Sequence[LocalShape], listings: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """The local names, in the order of `order`. `values` are the rank's parameters in the order of its file.

    Raises ProgramFault for a listing that the files do not have, or a name that the rank does not hold.
    """
    if isinstance(order.by, str):
        if order.by not in listings:
            there = ", ".join(listings) or "none"
            raise rules.scope.fault(f"listing {order.by!r}: expected one that the files hold ({there})", order.at)
        return tuple(listings[order.by])
    if isinstance(order.by, t.Names):
        known = {one.name for one in values}
        names = []
        for member in order.by.members:
            name = plain_name(member.name)
            if name not in known:
                raise rules.scope.fault(f"order {order.name!r} names {name!r}, which is no tensor there", member.name.at)
            if name in names:
                raise rules.scope.fault(f"order {order.name!r} has the name {name!r} twice", member.name.at)
            names.append(name)
        return tuple(names)
    return tuple(one.name for kind in order.by for one in values if len(one.shape) in _AXES[kind])
