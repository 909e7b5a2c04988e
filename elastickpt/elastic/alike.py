"""What members tell of their stages before they train together, and whether these fit: decided alike by all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec
from torch import Tensor

from elastickpt.elastic.neighbours import partner
from elastickpt.elastic.passage import Passing, flushes_of, orders_of
from elastickpt.elastic.stages import PARTS, Stage

_NUMBER = re.compile(r"\d+")
TensorForm = tuple[str, str, tuple[int, ...]]  # of a tensor: name, element type, shape


class About(msgspec.Struct, frozen=True):
    """One member's stage. `parts`: tensors of each part in the order of their kinds. `example`: element type and shape of the
    body's input and output, none for a stage that is the only one. `trained`: names of the body's parameters."""

    stage: int
    parts: dict[str, list[TensorForm]] = {}
    example: list[tuple[str, tuple[int, ...]]] = []
    trained: list[str] = []
    refused: str = ""


def about(stage: Stage, number: int) -> About:
    parts = {part: [(name, *_form(tensor)) for name, tensor in in_order(stage.tensors[part])] for part in stage.tensors}
    example = [] if stage.example is None else [_form(one) for one in stage.example]
    mine = {id(one) for one in stage.parameters("body")}
    trained = [name for name, tensor in stage.tensors["body"].items() if id(tensor) in mine]
    return About(number, parts, example, trained)  # type: ignore[arg-type]


def in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Alike names beside each other, by number: the order in which two stages that are alike have their tensors. [REC-3]"""
    return sorted(tensors.items(), key=lambda one: (kind_of(one[0]), [int(found) for found in _NUMBER.findall(one[0])]))


def kind_of(name: str) -> str:
    return _NUMBER.sub("#", name)


def why_apart(members: Sequence[About], passing: Passing, *, equal: bool) -> str:
    """Why these stages cannot be trained together; "" where they can. `equal`: one may be made of others."""
    stages = len(members)
    for one in members:
        if one.refused:
            return one.refused if one.refused.startswith("stage ") else f"stage {one.stage}: {one.refused}"
    return (
        _too_few(passing, stages)
        or _do_not_pass(members, passing)
        or (_bodies_apart(members) if equal else "")
        or (_replicas_apart(members) if passing.swap is not None else "")
    )


def _too_few(passing: Passing, stages: int) -> str:
    if passing.schedule != "1f1b":
        fewest = min(len(one.microbatches) for one in flushes_of(passing, step=0, stages=stages))
        return "" if fewest else f"microbatches={passing.microbatches}: expected at least one in each flush"
    needed = 2 * stages if passing.swap == "microbatch" else stages
    if passing.microbatches >= needed:
        return ""
    each = ", as each of two flushes needs one per stage" if passing.swap == "microbatch" else ""
    return f"microbatches={passing.microbatches} with {stages} stages under 1f1b: expected at least {needed}{each}"


def _do_not_pass(members: Sequence[About], passing: Passing) -> str:
    for order in orders_of(passing, stages=len(members)):
        for before, after in pairwise(order):
            gives, takes = members[before].example[1], members[after].example[0]
            if gives != takes:
                return f"stage {before} gives {_shown(*gives)} to stage {after}, which takes {_shown(*takes)}"
    return ""


def _bodies_apart(members: Sequence[About]) -> str:
    return next((why for one in members[1:] if (why := _apart(members[0], one, "body"))), "")


def _replicas_apart(members: Sequence[About]) -> str:
    for one in members:
        twin = partner(one.stage, len(members))
        if twin is not None and twin > one.stage:
            for part in PARTS:
                if part != "body" and (why := _apart(one, members[twin], part, names=True)):
                    return why
    return ""


def _apart(one: About, other: About, part: str, *, names: bool = False) -> str:
    mine, theirs = one.parts.get(part, []), other.parts.get(part, [])
    for a, b in zip(mine, theirs, strict=False):
        if (a[0] if names else kind_of(a[0]), *a[1:]) != (b[0] if names else kind_of(b[0]), *b[1:]):
            return _say(one, other, part, f"{a[0]!r}, {_shown(*a[1:])}, of the one is {b[0]!r}, {_shown(*b[1:])}, of the other")
    if len(mine) != len(theirs):
        longer, left = (one, mine) if len(mine) > len(theirs) else (other, theirs)
        name, *form = left[min(len(mine), len(theirs))]
        return _say(one, other, part, f"only stage {longer.stage} has {name!r}, {_shown(*form)}")  # type: ignore[arg-type]
    return ""


def _say(one: About, other: About, part: str, why: str) -> str:
    what = "a stage is rebuilt from others, so their bodies must be alike" if part == "body" else "these are replicas"
    return f"{part} of stages {one.stage} and {other.stage}: {why}; {what}"


def _form(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _shown(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {tuple(shape)}"
