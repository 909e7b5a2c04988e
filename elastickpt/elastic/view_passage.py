"""The members of a view say what they have built, before they train together; what does not fit is refused on all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastickpt.elastic.alike import About, about, why_apart
from elastickpt.elastic.duties import Exchange
from elastickpt.elastic.gradients import REPLICATED
from elastickpt.elastic.limits import OTHERS_S
from elastickpt.elastic.neighbours import partner
from elastickpt.elastic.passage import Passage, Passing
from elastickpt.elastic.stages import Place, Stage, require_parts
from elastickpt.errors import Refused
from elastickpt.format.digest import file_digest
from elastickpt.ranks.messages import decode, encode


@dataclass(frozen=True, slots=True, eq=False)
class ViewPassage:
    """What a view has besides its links. `trained`: the names of each stage's body parameters."""

    passage: Passage
    trained: Mapping[int, list[str]]


def stand_together(
    stage: Stage, place: Place, passing: Passing, passage: Passage, exchange: Exchange, *, equal: bool, ask: Callable[[], None]
) -> ViewPassage:
    """All members of a view call this. `equal`: a stage may be made of others; `ask`: looks at the next batch, where this stage
    sees one. Raises Refused, on all members alike, and what `exchange` raises."""
    mine = about(stage, place.stage)
    try:
        require_parts(stage, place, swap=passing.swap)
        ask()
    except Refused as error:
        mine = About(place.stage, refused=error.message)
    exchange.set(f"about/{place.stage}", encode(mine))
    told = exchange.get_all([f"about/{one}" for one in range(place.stages)], limit_s=OTHERS_S)
    members = [decode(one, About) for one in told]
    if why := why_apart(members, passing, equal=equal):
        raise Refused(why)
    return ViewPassage(passage, {one.stage: one.trained for one in members})


def require_equal_replicas(stage: Stage, place: Place, exchange: Exchange) -> None:
    """Both replicas of an embedding and a head begin alike, bit for bit. Raises Refused, naming the first tensor."""
    mine = {name: _digest(tensor) for part in REPLICATED for name, tensor in stage.tensors.get(part, {}).items()}
    exchange.set(f"replicas/{place.stage}", encode(mine))
    heard = exchange.get_all([f"replicas/{one}" for one in range(place.stages)], limit_s=OTHERS_S)
    told = [decode(one, dict[str, str]) for one in heard]
    for one, tensors in enumerate(told):
        twin = partner(one, place.stages)
        if twin is not None and twin > one:
            for name, digest in tensors.items():
                if told[twin].get(name) != digest:
                    raise Refused(
                        f"{name!r} begins with other values on stage {one} than on stage {twin}, which has a replica of it"
                    )


def _digest(tensor: Tensor) -> str:
    return file_digest(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
