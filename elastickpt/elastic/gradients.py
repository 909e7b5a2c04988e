"""What becomes of a stage's gradients between the last backward and the decision: summed over live replicas, divided, clipped.

An embedding or a head on both stages of an end pair is one layer: each stage has the part of the gradient that its microbatches
left, and both get the sum. Norms are those of torch's clipping: the norm of the norms of single tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from elastickpt.elastic.links import Links, told_by_all
from elastickpt.elastic.neighbours import partner
from elastickpt.elastic.stages import PARTS, Place, Stage, StagePart
from elastickpt.elastic.starts import KeptBuffers
from elastickpt.errors import Refused

NormScope = Literal["stage", "global"]
REPLICATED: tuple[StagePart, ...] = ("embed", "head")


@dataclass(frozen=True, slots=True)
class Clipping:
    """`limit`: the largest norm, None for any. `scope`: each place's body, the embedding and the head each by its own norm, or
    all by one. `reported`: the norm that a step reports and averages are weighted by is the one after clipping, or before."""

    limit: float | None = None
    scope: NormScope = "stage"
    reported: Literal["after", "before"] = "after"


def sum_over_replicas(stage: Stage, place: Place, links: Links) -> int:
    """Gradients of embedding and head become the sum of both stages' of their pair. Returns the bytes sent. Raises LinkBroken,
    Refused for sparse gradients."""
    twin, sent = partner(place.stage, place.stages), 0
    if twin is None:
        return sent
    for part in REPLICATED:
        if part in stage.parts:
            sent += _sum_with(stage.parameters(part), links, twin)
    return sent


def _sum_with(parameters: Sequence[nn.Parameter], links: Links, twin: int) -> int:
    mine = [one.grad for one in parameters]
    for parameter, grad in zip(parameters, mine, strict=True):
        if grad is not None and grad.layout is not torch.strided:
            shape = tuple(parameter.shape)
            raise Refused(f"a parameter {shape} with live replicas has a sparse gradient; expected a dense one")
    has = torch.tensor([grad is not None for grad in mine], dtype=torch.uint8)
    has_twin, received = torch.empty_like(has), list[Tensor | None]()
    sendings = [links.send(has, twin), *(links.send(grad, twin) for grad in mine if grad is not None)]
    links.receive(has_twin, twin)
    for parameter, there in zip(parameters, has_twin.tolist(), strict=True):
        other = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device) if there else None
        if other is not None:
            links.receive(other, twin)
        received.append(other)
    for sending in sendings:
        sending.wait()  # before the gradients change
    for parameter, grad, other in zip(parameters, mine, received, strict=True):
        if grad is None:
            parameter.grad = other
        elif other is not None:
            parameter.grad = grad + other if links.stage < twin else other + grad
    return sum(grad.nbytes for grad in mine if grad is not None)


def keep_buffers_equal(stage: Stage, place: Place, order: Sequence[int], links: Links, kept: KeptBuffers) -> int:
    """Buffers of embedding and head that forward changed become, on both stages of their pair, those of the one that passed the
    first microbatches, at the ends of `order`; `kept` are those from before. Returns the bytes sent. Raises LinkBroken, Refused
    for a buffer that got another form. [REC-62]"""
    twin, sent = partner(place.stage, place.stages), 0
    if twin is None:
        return sent
    ends: tuple[tuple[StagePart, int], ...] = (("embed", order[0]), ("head", order[-1]))
    for part, first in ends:
        now = {name: one for name, one in stage.tensors.get(part, {}).items() if not isinstance(one, nn.Parameter)}
        if not now:
            continue
        changed = torch.tensor([not torch.equal(one, kept.content(name)) for name, one in now.items()], dtype=torch.uint8)
        if place.stage == first:
            sent += _give(now, changed, links, twin, kept)
            continue
        links.receive(changed, twin)
        for name, there in zip(now, changed.tolist(), strict=True):
            before = kept.content(name)
            content = torch.empty(before.shape, dtype=before.dtype, device=before.device) if there else before
            if there:
                links.receive(content, twin)
            kept.put(name, content)
    return sent


def _give(now: Mapping[str, Tensor], changed: Tensor, links: Links, twin: int, kept: KeptBuffers) -> int:
    given = [name for name, there in zip(now, changed.tolist(), strict=True) if there]
    for name in given:
        if (now[name].shape, now[name].dtype) != (kept.content(name).shape, kept.content(name).dtype):
            raise Refused(f"{name!r}, which has a live replica, got another shape or type by forward; expected the same one")
    sendings = [links.send(one, twin) for one in (changed, *(now[name] for name in given))]
    for sending in sendings:
        sending.wait()
    return sum(now[name].nbytes for name in given)


def divide(parameters: Iterable[nn.Parameter], count: int) -> None:
    """Sums over microbatches become means; once, and not where there is one."""
    if count != 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(count)


def clip(stage: Stage, place: Place, clipping: Clipping, links: Links) -> float:
    """Clips the stage's gradients, and returns the norm of its body's. Raises LinkBroken."""
    body = stage.parameters("body")
    before = get_total_norm(_grads(body))
    if clipping.limit is None:
        return before.item()
    if clipping.scope == "global":
        total = _norm_of_all(stage, place, links)
        clip_grads_with_norm_([one for part in PARTS for one in stage.parameters(part)], clipping.limit, total)
    else:
        for part in PARTS:
            parameters = stage.parameters(part)
            total = before if part == "body" else get_total_norm(_grads(parameters))
            clip_grads_with_norm_(parameters, clipping.limit, total)
    return before.item() if clipping.reported == "before" else get_total_norm(_grads(body)).item()


def _norm_of_all(stage: Stage, place: Place, links: Links) -> Tensor:
    """The norm of the whole model's gradient: embedding, bodies by stage, head, each once."""
    elsewhere = {"embed": place.stage != 0, "head": place.stage != place.stages - 1}
    counted = [part for part in PARTS if not elsewhere.get(part, False)]
    grads = [grad for part in counted for grad in _grads(stage.parameters(part))]
    norms = torch.tensor([torch.linalg.vector_norm(grad).item() for grad in grads], dtype=torch.float64)
    counts = [int(one) for one in told_by_all(links, torch.tensor([len(norms)]))]
    padded = torch.zeros(max(counts), dtype=torch.float64)
    padded[: len(norms)] = norms
    told = torch.cat([one[:count] for one, count in zip(told_by_all(links, padded), counts, strict=True)])
    wide = any(grad.dtype == torch.float64 for grad in grads)
    norm: Tensor = torch.linalg.vector_norm(told if wide else told.float())
    return norm


def _grads(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [one.grad for one in parameters if one.grad is not None]
