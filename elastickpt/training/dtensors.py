"""Tensors as held arrays: where a rank's local tensor lies in the whole, and who else holds the same elements.

A DTensor's box comes from what torch physically does (TP first, then `torch.chunk` of the TP-local extent), never from
`compute_local_shape_and_global_offset`, which is wrong for uneven strided shards: 9 rows on TP2 x FSDP4 put the last
row on the wrong TP rank. A box whose shape is not its local tensor's is refused by `HeldArray`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.arrays import ArrayId, ArraySpec, Mesh
from elastickpt.format.box import Box
from elastickpt.layout.placement import physical_box
from elastickpt.training.elements import Attributes, Elements, composition_of, elements_of, inner_tensors, settled
from elastickpt.training.held import HeldArray, Kept, Role, Sharing
from elastickpt.training.loaded import is_loaded_instance, loaded_type
from elastickpt.training.memo import Memo, Seen
from elastickpt.training.meshes import mesh_of, widened

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_DTENSOR = ("torch.distributed.tensor", "DTensor")


@dataclass(frozen=True, slots=True)
class Job:
    """This process in its job: global rank, number of ranks, and the mesh, if any, that repeats plain tensors.

    `memo` spares captures of one state after another most of their work; None does all of it.
    """

    rank: int
    world_size: int
    declared: Mesh | None = None
    memo: Memo | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Holders:
    """Who else holds a plain tensor: all ranks that do, or none where it is `undeclared`."""

    sharing: Sharing
    ranks: tuple[int, ...]
    kept: Kept = "equal"


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A DTensor taken apart: this rank's local tensor, the whole's shape, and torch's mesh and placements."""

    local: torch.Tensor
    shape: tuple[int, ...]
    device_mesh: DeviceMesh
    placements: tuple[Any, ...]


def holders_of(job: Job, *, data_parallel: Sequence[int] = (), kept: Kept = "equal") -> Holders:
    """Who holds this rank's plain tensors: DDP's group, the declared mesh, both together, or it is not known. `kept`:
    what keeps those of data parallel ranks equal."""
    ranks = set(data_parallel)
    if job.declared is not None and job.rank in job.declared.ranks:
        ranks.update(job.declared.ranks)
    if job.world_size == 1:
        ranks = {job.rank}
    return _declared(tuple(sorted(ranks)), kept if data_parallel else "equal") if ranks else _UNDECLARED


_UNDECLARED = Holders("undeclared", ())


@lru_cache(maxsize=64)  # one object for all tensors that the same ranks hold, so that it is compared by identity
def _declared(ranks: tuple[int, ...], kept: Kept) -> Holders:
    return Holders("declared", ranks, kept)


def placed(tensor: torch.Tensor) -> Placed | None:
    """A DTensor's parts; None for another tensor. DDP over a 2-D mesh keeps local tensors with the placement beside."""
    if is_loaded_instance(tensor, *_DTENSOR):
        spec, local = tensor._spec, settled(tensor._local_tensor)  # type: ignore[attr-defined]
    else:
        spec, local = getattr(tensor, "_st_info", None), tensor
        if spec is None:
            return None
    return Placed(local, tuple(spec.shape), spec.mesh, tuple(spec.placements))


def hold(array: ArrayId, tensor: torch.Tensor, *, role: Role, job: Job, holders: Holders) -> tuple[HeldArray, ...]:
    """What this rank holds of `tensor`: one array; several for a composite tensor; none on a rank outside its mesh.

    The held tensors share memory with `tensor`. `holders` counts for plain tensors; a DTensor gets from it the axes of
    its root mesh along which those ranks repeat it. Raises LayoutUnsupported for a placement with no box,
    ValueNotCarried for contents that no array has.
    """
    memo, plain = job.memo, None if job.memo is None else memorable(tensor)
    if memo is None or plain is None:
        return _hold(array, tensor, role=role, job=job, holders=holders)
    local, spec = plain
    cause = (holders, spec, *parts_of_spec(spec))
    if (again := memo.find(tensor, local, array, role, cause)) is not None:
        return (again,)
    found = _hold(array, tensor, role=role, job=job, holders=holders)
    if len(found) == 1:
        memo.put(tensor, Seen.of(found[0], local, role=role, cause=cause))
    return found


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def memorable(tensor: torch.Tensor) -> tuple[torch.Tensor, object] | None:
    """The local tensor and the DTensor's spec (None for a plain tensor), if where it lies follows from those alone."""
    spec, local = None, tensor
    if type(tensor) not in _PLAIN:
        cls = loaded_type(*_DTENSOR)
        if cls is None or type(tensor) is not cls:
            return None
        spec, local = tensor._spec, tensor._local_tensor  # type: ignore[attr-defined]
        if type(local) not in _PLAIN:
            return None
    elif getattr(tensor, "_st_info", None) is not None:
        return None
    if local.layout is not torch.strided or local.dtype.is_complex or local.is_meta or local.is_quantized:
        return None
    return local, spec


def parts_of_spec(spec: object) -> tuple[object, ...]:
    """What a DTensor's spec says, as the objects that it holds now; () for None."""
    return () if spec is None else (spec.mesh, spec.placements, spec.tensor_meta)  # type: ignore[attr-defined]


def _hold(array: ArrayId, tensor: torch.Tensor, *, role: Role, job: Job, holders: Holders) -> tuple[HeldArray, ...]:
    tensor = settled(tensor)
    parts = placed(tensor)
    if parts is None:
        return tuple(_hold_plain(array, tensor, role, holders))
    if job.rank not in (mesh := mesh_of(parts.device_mesh, world_size=job.world_size)).ranks:
        return ()
    placements = spell_placements(parts.placements, mesh.sizes, where=array)
    box = physical_box(parts.shape, sizes=mesh.sizes, coordinate=mesh.coordinate(job.rank), placements=placements)
    if not set(holders.ranks) <= set(mesh.ranks):
        wide = widened(parts.device_mesh, placements, replicas=holders.ranks, rank=job.rank, world_size=job.world_size)
        mesh, placements = wide or (mesh, placements)
    held = []
    for path, inner in _inner_of_shard(array, parts.local):
        elements = elements_of(_of_shape(inner, box), where=array)
        held.append(
            HeldArray(
                _spec(array, path, parts.shape, elements),
                _with_tail(box, elements.tail),
                elements.tensor,
                role,
                "placed",
                mesh=mesh,
                placements=placements,
                attributes=(*composition_of(parts.local), *elements.attributes),
            )
        )
    return tuple(held)


def _hold_plain(array: ArrayId, tensor: torch.Tensor, role: Role, holders: Holders) -> Iterator[HeldArray]:
    composition: Attributes = composition_of(tensor)
    for path, inner in inner_tensors(tensor):
        if placed(inner) is not None:
            raise LayoutUnsupported(f"tensor {array}: {type(tensor).__name__} holds a DTensor inside, as {path!r}")
        elements = elements_of(inner, where=array)
        spec = _spec(array, path, tuple(inner.shape), elements)
        yield HeldArray(
            spec,
            Box.whole(spec.shape),
            elements.tensor,
            role,
            holders.sharing,
            replicas=holders.ranks,
            attributes=(*composition, *elements.attributes),
            kept=holders.kept,
        )


def _spec(array: ArrayId, path: str, shape: tuple[int, ...], elements: Elements) -> ArraySpec:
    return ArraySpec(_sibling(array, path), (*shape, *elements.tail), elements.dtype)


def _sibling(array: ArrayId, path: str) -> ArrayId:
    """The array of one part of a composite tensor: `value` -> `value.codes`; in `extra`, `a/b` -> `a/b/codes`."""
    if not path:
        return array
    if array.section == "params":
        return replace(array, state=f"{array.state}.{path}")
    return replace(array, name=f"{array.name}/{path}" if array.name else path)


def _inner_of_shard(array: ArrayId, local: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for path, inner in inner_tensors(local):
        if inner.shape != local.shape:
            raise LayoutUnsupported(
                f"tensor {array}: {type(local).__name__} is sharded, and its part {path!r} of shape "
                f"{tuple(inner.shape)} is not cut as its shape {tuple(local.shape)} is: its place in the whole is not "
                f"known"
            )
        yield path, inner


def _of_shape(local: torch.Tensor, box: Box) -> torch.Tensor:
    """`local`, or for an empty shard (torch leaves its other axes at any extent) an empty tensor of the box's shape."""
    if box.count == 0 == local.numel() and tuple(local.shape) != box.shape:
        return local.new_empty(box.shape)
    return local


def _with_tail(box: Box, tail: tuple[int, ...]) -> Box:
    return Box((*box.start, *(0 for _ in tail)), (*box.stop, *tail)) if tail else box


def spell_placements(placements: Sequence[Any], sizes: Sequence[int], *, where: object) -> tuple[str, ...]:
    """Placements as the format spells them: "R", "S(d)", "_S(d)". Raises LayoutUnsupported for any other one."""
    strided = loaded_type("torch.distributed.tensor.placement_types", "_StridedShard")
    spelled = []
    for index, placement in enumerate(placements):
        if placement.is_replicate():
            spelled.append("R")
        elif strided is not None and isinstance(placement, strided):
            spelled.append(_spell_strided(placement, index, placements, sizes, where))
        elif placement.is_shard():
            spelled.append(f"S({placement.dim})")
        else:
            raise LayoutUnsupported(
                f"tensor {where} is placed as {placement} on axis {index} of its mesh, expected Shard or Replicate: a "
                f"sum that is still to be reduced has no elements of its own; redistribute it before"
            )
    return tuple(spelled)


def _spell_strided(placement: Any, index: int, placements: Sequence[Any], sizes: Sequence[int], where: object) -> str:
    others = [k for k, other in enumerate(placements) if k != index and getattr(other, "dim", None) == placement.dim]
    inner = prod(sizes[k] for k in others)
    if placement.split_factor == 1 and not others:
        return f"S({placement.dim})"
    if placement.split_factor != inner:
        raise LayoutUnsupported(
            f"tensor {where} is placed as {placement} on axis {index} of its mesh; expected split factor {inner}, the "
            f"number of its other shards of that dimension: only the strides of FSDP2 over tensor parallelism have a "
            f"box"
        )
    return f"_S({placement.dim})"
