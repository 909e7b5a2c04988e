"""CheckFree: a lost pipeline stage from the two stages beside it, as pure functions over named tensors.

    W_i = (ω_{i−1} W_{i−1} + ω_{i+1} W_{i+1}) / (ω_{i−1} + ω_{i+1})          arXiv 2506.15461, §4.2, Algorithm 1

ω is the norm of a stage's gradient in the last committed step. The paper's text can be read as the squared norm; the
published code takes the norm after clipping plus 1e-4, and so does `alpha` by default. Stage against stage: layer j of the
lost one is made of layer j of each neighbour. With the swapped order of CheckFree+ (§4.3) the two stages of each end
have learned each other's part, and one is a copy of the other. Rules and vectors: `spec/recovery-v1.md`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from elastickpt.elastic.neighbours import EPS as EPS
from elastickpt.elastic.neighbours import alpha as alpha
from elastickpt.elastic.neighbours import partner as partner
from elastickpt.elastic.neighbours import sources as sources
from elastickpt.errors import Refused

_NUMBER = re.compile(r"\d+")
_KEPT = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_KEPT |= {torch.uint16, torch.uint32, torch.uint64}


def match(
    lost: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> dict[str, tuple[str, str]]:
    """For each name of the lost stage the names of its counterparts in both neighbours. [REC-3]

    Names are alike when they are equal but for their numbers; alike names are paired in numeric order: the first layer of
    one stage with the first of the others. Only names, shapes and element types are looked at.

    Args:
        lost: The tensors of the lost stage, on any device, meta included.
        before: Those of the stage before it.
        after: Those of the stage after it.

    Returns:
        Lost name → (name before, name after).

    Raises:
        Refused: A stage lacks a tensor, or one has another shape or element type; the first that differs is named.

    Examples:
        >>> one = torch.zeros(2)
        >>> ek.elastic.checkfree.match({"h.2.w": one}, {"h.1.w": one}, {"h.3.w": one})
        {'h.2.w': ('h.1.w', 'h.3.w')}
    """
    first, second = _paired(lost, before, side="before"), _paired(lost, after, side="after")
    return {name: (first[name], second[name]) for name in lost}


def _paired(lost: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], *, side: str) -> dict[str, str]:
    mine, theirs = _alike(lost), _alike(other)
    pairs: dict[str, str] = {}
    for name in lost:
        kind = _NUMBER.sub("#", name)
        place, found = mine[kind].index(name), theirs.get(kind, [])
        if place >= len(found):
            raise Refused(
                f"stage {side} the lost one: expected {len(mine[kind])} tensors like {name!r}, of {_shown(lost[name])}, "
                f"found {len(found)}; stages that stand in for each other must have equal parts"
            )
        pairs[name] = found[place]
        if (expected := _shown(lost[name])) != (got := _shown(other[found[place]])):
            raise Refused(
                f"stage {side} the lost one: {found[place]!r} is {got}, expected {expected} as {name!r} of the lost stage is; "
                f"stages that stand in for each other must have equal parts"
            )
    unpaired = set(other) - set(pairs.values())
    if unpaired:
        name = next(name for name in other if name in unpaired)
        raise Refused(
            f"stage {side} the lost one: {name!r}, of {_shown(other[name])}, has no counterpart in the lost stage; stages that "
            f"stand in for each other must have equal parts"
        )
    return pairs


def _alike(stage: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Names without their numbers → the names that become this, in numeric order."""
    kinds: dict[str, list[str]] = {}
    for name in stage:
        kinds.setdefault(_NUMBER.sub("#", name), []).append(name)
    for names in kinds.values():
        names.sort(key=lambda name: ([int(number) for number in _NUMBER.findall(name)], name))
    return kinds


def _shown(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def average(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """The lost stage: of each tensor `alpha` parts from before it and 1 − `alpha` from after it. [REC-4, REC-5]

    fp32(α)·b + fp32(1−α)·a, two products and one sum in float32 (float64 for float64), then one cast to the tensors' own
    type. Integers and bool are those from before. The inputs do not change.

    Args:
        before: The tensors of the stage before, under the lost stage's names (see `match`).
        after: Those of the stage after, under the same names.
        alpha: The share of the stage before, in [0, 1].

    Returns:
        The tensors of the lost stage, on the device of `before`; they share no memory with anything, and record no
        gradient.

    Raises:
        Refused: Names, shapes, types or devices differ; a tensor is complex, or not dense and plain; `alpha` is not in [0,
            1].

    Examples:
        >>> ek.elastic.checkfree.average({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}, 0.75)
        {'w': tensor([1.5000, 3.0000])}
    """
    if not 0.0 <= alpha <= 1.0:
        raise Refused(f"alpha {alpha}: expected a share from 0 to 1")
    for name in (*before, *after):
        if name not in before or name not in after:
            missing = "before" if name not in before else "after"
            raise Refused(f"{name!r}: not among the tensors of the stage {missing} the lost one")
        _require_plain(name, before[name], after[name])
    with torch.no_grad():
        return {name: _mixed(tensor.detach(), after[name].detach(), alpha) for name, tensor in before.items()}


def _require_plain(name: str, *tensors: torch.Tensor) -> None:
    one, other = tensors
    if _shown(one) != _shown(other) or one.device != other.device:
        raise Refused(
            f"{name!r}: {_shown(one)} on {one.device} before the lost stage, {_shown(other)} on {other.device} after it; "
            f"expected the same"
        )
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            raise Refused(f"{name!r}: a {type(tensor).__name__} ({tensor.layout}), expected a dense plain tensor")
    if one.is_complex() or one.is_quantized:
        raise Refused(f"{name!r}: {_shown(one)}, expected real numbers; complex and quantised tensors are not averaged")


def _mixed(before: torch.Tensor, after: torch.Tensor, alpha: float) -> torch.Tensor:
    if before.dtype in _KEPT:
        return before.clone()
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    share = torch.tensor(alpha, dtype=torch.float64).to(wide).to(before.device)
    rest = torch.tensor(1.0 - alpha, dtype=torch.float64).to(wide).to(before.device)
    mixed = torch.mul(before.to(wide), share)
    mixed += torch.mul(after.to(wide), rest)
    return mixed.to(before.dtype)
