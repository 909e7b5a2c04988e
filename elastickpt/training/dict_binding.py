"""Dicts of nothing but tensors taking what a checkpoint has: in columns, where all of a dict was saved so and lies so.

Where DTensors lie is found once for all that are alike: a state of 333 has few meshes, placements and shapes, and 10 µs of 50
are left for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from elastickpt.format.arrays import ArraySpec, Box
from elastickpt.format.values import ArrayReference, Value
from elastickpt.training.binder import Binder
from elastickpt.training.dtensors import DTENSOR, Holders, JobView, Way, holders_of, way_of
from elastickpt.training.elements import dtype_name, lie_in_order, lie_plainly, loaded_type
from elastickpt.training.held import is_repeated
from elastickpt.training.listing import TargetColumns
from elastickpt.training.modules import hold_plain, meet_placed, meet_plain
from elastickpt.training.trees import tokens

_ITEM, _NAME, _ORIGIN = attrgetter("item"), attrgetter("name"), attrgetter("origin")
_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")
_SPEC, _LOCAL = attrgetter("_spec"), attrgetter("_local_tensor")


def bind_dict(binder: Binder, item: str, live: dict[Any, Any], saved: Mapping[Any, Value], *, below: str) -> bool:
    """Makes targets of a dict of plain tensors, or of DTensors, at once, if all of it, and nothing else, was saved so: False
    where there is anything more to say of any of them, and nothing is bound. It stands at the name `below` of its item."""
    tensors = tuple(live.values())
    if not tensors or live.keys() != saved.keys() or not binder.identities.are_new(tensors):
        return False
    parts = boxed(tensors, job=binder.job, holders=holders_of(binder.job))
    if parts is None and not lie_plainly(tensors):
        return False
    names = tokens(tuple(live))
    names = [f"{below}/{name}" for name in names] if below else names
    found = list(map(saved.__getitem__, live))
    if set(map(type, found)) != {ArrayReference} or list(map(_NAME, found)) != names:
        return False
    if set(map(_ITEM, found)) != {item} or set(map(_ORIGIN, found)) != {"torch"}:
        return False
    shapes = list(map(_SHAPE, tensors)) if parts is None else parts.shapes
    places = binder.listing.columns.alike(item, names, shapes, list(map(dtype_name, map(_DTYPE, tensors))))
    if places is None or binder.names.are_tied(item, names):
        return False
    if parts is not None:
        _bind_boxed(binder, item, names, places, tensors, parts)
    else:
        _bind_plain(binder, item, names, places, tensors)
    return True


def _bind_plain(
    binder: Binder, item: str, names: Sequence[str], places: Sequence[int], tensors: Sequence[torch.Tensor]
) -> None:
    columns, job, identities = binder.listing.columns, binder.job, binder.identities

    def spec_of(number: int) -> ArraySpec:
        return columns.record(places[number]).spec

    if not lie_in_order(tensors):
        binder.fill_all(hold_plain(item, tensors, list(map(spec_of, range(len(places)))), job=job, identities=identities))
        return
    holders = meet_plain(item, names, tensors, spec_of, job=job, identities=identities)
    known: dict[tuple[int, ...], int] = {}
    box = [known.setdefault(columns.shapes[place], len(known)) for place in places]
    boxes, alone = tuple(map(Box.whole, known)), len(holders.ranks) == 1
    binder.columns.append(TargetColumns(np.array(places), boxes, np.array(box), tensors, alone))


def _bind_boxed(
    binder: Binder,
    item: str,
    names: Sequence[str],
    places: Sequence[int],
    tensors: Sequence[torch.Tensor],
    parts: BoxedTensors,
) -> None:
    meet_placed(item, names, tensors, job=binder.job, identities=binder.identities)
    binder.changed += tensors
    at, box = np.array(places), np.array(parts.box)
    alone = np.array(parts.alone)[box]
    for held_alone in (True, False):
        mine = np.flatnonzero(alone == held_alone)
        if len(mine):
            local = parts.local if len(mine) == len(at) else [parts.local[k] for k in mine.tolist()]
            binder.columns.append(TargetColumns(at[mine], parts.boxes, box[mine], local, held_alone))


@dataclass(frozen=True, slots=True, eq=False)
class BoxedTensors:
    """DTensors taken apart, each with a plain local tensor in host memory, without gaps, in C order, that is all of its box.

    `shapes` are those of the wholes; `box` says which of `boxes` each one's is, and `alone` of each box whether no other rank
    is known to hold the same elements.
    """

    local: Sequence[torch.Tensor]
    shapes: Sequence[tuple[int, ...]]
    boxes: Sequence[Box]
    alone: Sequence[bool]
    box: Sequence[int]


def boxed(tensors: Sequence[torch.Tensor], *, job: JobView, holders: Holders) -> BoxedTensors | None:
    """What these are if all are such DTensors; None where there is more to say of one. Raises LayoutUnsupported for a placement
    that has no box."""
    cls = loaded_type(*DTENSOR)
    if cls is None or set(map(type, tensors)) != {cls}:
        return None
    local, specs = list(map(_LOCAL, tensors)), list(map(_SPEC, tensors))
    if not lie_plainly(local) or not lie_in_order(local):
        return None
    shapes = list(map(tuple, map(_SHAPE, tensors)))
    ways: dict[tuple[object, ...], int] = {}
    known: list[Way] = []
    kinds: dict[tuple[int, tuple[int, ...]], int] = {}
    box = []
    for spec, shape in zip(specs, shapes, strict=True):
        placements = spec.placements
        alike = spec.mesh, placements, tuple(map(type, placements))
        way = ways.setdefault(alike, len(ways))
        if way == len(known):
            found = way_of(spec.mesh, placements, where="of a dict of tensors", job=job, holders=holders)
            if found is None:
                return None
            known.append(found)
        box.append(kinds.setdefault((way, shape), len(kinds)))
    boxes = [known[way].box(shape, rank=job.rank) for way, shape in kinds]
    for tensor, number in zip(local, box, strict=True):
        if tensor.shape != (own := boxes[number].shape) and (tensor.numel() or 0 not in own):
            return None
    alone = [not is_repeated(known[way].mesh, known[way].placements) for way, _ in kinds]
    return BoxedTensors(local, shapes, boxes, alone, box)
