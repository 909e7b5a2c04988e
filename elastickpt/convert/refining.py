"""What options change of contents before they are written: masters, casts, what is left out. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from elastickpt.convert.contents import Array, Contents, with_arrays
from elastickpt.convert.nodes import Cast, Gathered
from elastickpt.convert.options import Weights
from elastickpt.errors import Refused
from elastickpt.foreign.listing import ForeignCheckpoint, LocalTensor, NotCarried, ParamGroup, WholeTensor
from elastickpt.format.arrays import DTYPES, ArrayId


def without_numbered(found: ForeignCheckpoint, only: tuple[str, ...], skip: tuple[str, ...]) -> ForeignCheckpoint:
    """The listing without the states that `skip` names, of optimizers that count their parameters.

    Their names are numbers: `optimizer/3/exp_avg`. An optimizer of which no array is left goes with its groups, and is named.
    """
    if not only and not skip:
        return found
    tensors = [one for rank in found.ranks for one in rank.tensors] + list(found.wholes)
    groups = [group for rank in found.ranks for group in rank.groups] + list(found.groups)
    counting = {one.item for one in tensors if isinstance(one.name, int)}
    counting |= {group.item for group in groups if any(isinstance(member, int) for member in group.members)}
    gone = {item for item in counting if _is_gone(item, tensors, groups, only, skip)}

    def stays(one: LocalTensor | WholeTensor) -> bool:
        return one.item not in gone and not (isinstance(one.name, int) and _left_out(one, (), skip))

    ranks = tuple(
        replace(
            rank,
            tensors=tuple(one for one in rank.tensors if stays(one)),
            groups=tuple(group for group in rank.groups if group.item not in gone),
            scalars=tuple(one for one in rank.scalars if one.item not in gone),
        )
        for rank in found.ranks
    )
    lost = tuple(NotCarried(item, "left out by --only or --skip") for item in sorted(gone))
    return replace(
        found,
        ranks=ranks,
        wholes=tuple(one for one in found.wholes if stays(one)),
        scalars=tuple(one for one in found.scalars if one.item not in gone),
        groups=tuple(group for group in found.groups if group.item not in gone),
        not_carried=(*found.not_carried, *lost),
    )


def _is_gone(
    item: str,
    tensors: Sequence[LocalTensor | WholeTensor],
    groups: Sequence[ParamGroup],
    only: tuple[str, ...],
    skip: tuple[str, ...],
) -> bool:
    """Whether nothing of an optimizer stays; one without tensors goes by the names of its members, `optimizer/3`."""
    states = [one for one in tensors if one.item == item and _shape(one) != ()]
    if states:
        return all(_left_out(one, only, skip) for one in states)
    members = [f"{item}/{member}" for group in groups if group.item == item for member in group.members]
    hits = [[fnmatchcase(text, glob) for glob in globs for text in (item, *members)] for globs in (only, skip)]
    return any(hits[1]) or (bool(only) and not any(hits[0]))


def _shape(one: LocalTensor | WholeTensor) -> tuple[int, ...]:
    return one.stored.shape if isinstance(one, LocalTensor) else one.shape


def _left_out(one: LocalTensor | WholeTensor, only: tuple[str, ...], skip: tuple[str, ...]) -> bool:
    texts = (f"{one.item}/{one.name}", f"{one.name}/{one.state}", f"{one.item}/{one.name}/{one.state}", one.item, one.state)
    hit = [any(fnmatchcase(text, glob) for glob in globs for text in texts) for globs in (only, skip)]
    return hit[1] or (bool(only) and not hit[0])


def with_masters(contents: Contents, weights: Weights | None) -> Contents:
    """Masters of the weights' own type become one with them, to be found equal; others stay, or become the weights."""
    arrays = dict(contents.arrays)
    for identity, master in contents.arrays.items():
        if identity.state != "master":
            continue
        value_id = ArrayId(identity.section, identity.item, identity.name, "value")
        value = arrays.get(value_id)
        if value is not None and value.node.dtype == master.node.dtype and weights is None:
            if isinstance(value.node, Gathered) and isinstance(master.node, Gathered):
                both = replace(value.node, shares=(*value.node.shares, *master.node.shares))
                arrays[value_id] = replace(value, node=both)
                del arrays[identity]
        elif weights == "master" or value is None:
            arrays[value_id] = replace(master, id=value_id)
            del arrays[identity]
        elif weights == "value":
            del arrays[identity]
    return replace(contents, arrays=arrays)


def with_casts(contents: Contents, casts: Mapping[str, str]) -> Contents:
    """States in other element types. Raises Refused for a state that is nowhere, or an unknown type."""
    if not casts:
        return contents
    states = {identity.state for identity in contents.arrays}
    for state, dtype in casts.items():
        if state not in states:
            raise Refused(f"--cast {state}={dtype}: there is no such state; expected one of {', '.join(sorted(states))}")
        if dtype not in DTYPES:
            raise Refused(f"--cast {state}={dtype}: expected one of the types {', '.join(DTYPES)}")
    return with_arrays(contents, (_cast(one, casts.get(one.id.state)) for one in contents.arrays.values()))


def _cast(array: Array, dtype: str | None) -> Array:
    return array if dtype is None or dtype == array.node.dtype else replace(array, node=Cast(array.node, dtype))
