"""Tensors as held arrays: where a rank's local tensor lies in the whole, and who else holds the same elements.

A DTensor's box comes from what torch physically does (TP first, then `torch.chunk` of the TP-local extent), never from
`compute_local_shape_and_global_offset`, which is wrong for uneven strided shards: 9 rows on TP2 x FSDP4 put the last
row on the wrong TP rank. A box whose shape is not its local tensor's is refused by `HeldArray`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.arrays import ArrayId, ArraySpec, Box, Mesh
from elastickpt.layout.placement import physical_box
from elastickpt.training.composites import CompositeCut, Path, attributes_of, composition_of, cuts_of, is_composite, leaves_of
from elastickpt.training.elements import PLAIN, elements_of, has_memory, is_loaded_instance, loaded_type, settled
from elastickpt.training.held import HeldArray, Kept, Memo, Role, Seen, Sharing
from elastickpt.training.parallel import mesh_of, spell_placements, widened
from elastickpt.training.trees import token

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DTENSOR = ("torch.distributed.tensor", "DTensor")
_PLAIN_TYPES = frozenset(PLAIN)


@dataclass(frozen=True, slots=True)
class JobView:
    """This process in its job: global rank, number of ranks, and the mesh, if any, that repeats plain tensors.

    `memo` spares captures of one state after another most of their work; None does all of it. `ways` are those found so far.
    """

    rank: int
    world_size: int
    declared: Mesh | None = None
    memo: Memo | None = field(default=None, compare=False)
    ways: dict[tuple[object, ...], Way] = field(default_factory=dict, init=False, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Holders:
    """Who else holds a plain tensor: all ranks that do, or none where it is `undeclared`."""

    sharing: Sharing
    ranks: tuple[int, ...]
    kept: Kept = "equal"


@dataclass(frozen=True, slots=True, eq=False)
class DTensorParts:
    """A DTensor taken apart: this rank's local tensor, the whole's shape, and torch's mesh and placements."""

    local: torch.Tensor
    shape: tuple[int, ...]
    device_mesh: DeviceMesh
    placements: tuple[Any, ...]


def holders_of(job: JobView, *, data_parallel: Sequence[int] = (), kept: Kept = "equal") -> Holders:
    """Who holds this rank's plain tensors: DDP's group, the declared mesh, both together, or it is not known. `kept`:
    what keeps those of data parallel ranks equal."""
    if job.declared is None and not data_parallel:  # the usual case
        return _declared((job.rank,), "equal") if job.world_size == 1 else _UNDECLARED
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


def placed(tensor: torch.Tensor) -> DTensorParts | None:
    """A DTensor's parts; None for another tensor. DDP over a 2-D mesh keeps local tensors with the placement beside."""
    if type(tensor) not in PLAIN and is_loaded_instance(tensor, *DTENSOR):
        spec, local = tensor._spec, settled(tensor._local_tensor)  # type: ignore[attr-defined]
    else:
        spec, local = getattr(tensor, "_st_info", None), tensor
        if spec is None:
            return None
    return DTensorParts(local, tuple(spec.shape), spec.mesh, tuple(spec.placements))


def hold(array: ArrayId, tensor: torch.Tensor, *, role: Role, job: JobView, holders: Holders) -> tuple[HeldArray, ...]:
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


def memorable(tensor: torch.Tensor) -> tuple[torch.Tensor, object] | None:
    """The local tensor and the DTensor's spec (None for a plain tensor), if where it lies follows from those alone."""
    spec, local = None, tensor
    if type(tensor) not in PLAIN:
        cls = loaded_type(*DTENSOR)
        if cls is None or type(tensor) is not cls:
            return None
        spec, local = tensor._spec, tensor._local_tensor  # type: ignore[attr-defined]
        if type(local) not in PLAIN:
            return None
    elif getattr(tensor, "_st_info", None) is not None:
        return None
    if local.layout is not torch.strided or local.dtype.is_complex or local.is_meta or local.is_quantized:
        return None
    if local.is_nested or local.is_neg() or not has_memory(local):
        return None
    return local, spec


@dataclass(frozen=True, slots=True, eq=False)
class LocalParts:
    """Plain local tensors, and what their places follow from beside: specs of DTensors, each with its parts; () if they are
    the tensors themselves."""

    tensors: Sequence[torch.Tensor]
    cause: Sequence[object]


_LOCAL, _SPEC = attrgetter("_local_tensor"), attrgetter("_spec")
_OF_SPEC = (attrgetter("mesh"), attrgetter("placements"), attrgetter("tensor_meta"))


def local_parts(tensors: Sequence[torch.Tensor]) -> LocalParts | None:
    """Of tensors that are all plain, or all DTensors of plain ones; else None."""
    kinds = set(map(type, tensors))
    if kinds <= _PLAIN_TYPES:
        return LocalParts(tensors, ())
    cls = loaded_type(*DTENSOR)
    if cls is None or kinds != {cls}:
        return None
    local = list(map(_LOCAL, tensors))
    if not set(map(type, local)) <= _PLAIN_TYPES:
        return None
    specs = list(map(_SPEC, tensors))
    return LocalParts(local, (*specs, *chain.from_iterable(map(part, specs) for part in _OF_SPEC)))


def parts_of_spec(spec: object) -> tuple[object, ...]:
    """What a DTensor's spec says, as the objects that it holds now; () for None."""
    return () if spec is None else (spec.mesh, spec.placements, spec.tensor_meta)  # type: ignore[attr-defined]


def _hold(array: ArrayId, tensor: torch.Tensor, *, role: Role, job: JobView, holders: Holders) -> tuple[HeldArray, ...]:
    tensor = settled(tensor)
    parts = placed(tensor)
    if parts is None:
        return tuple(_hold_plain(array, tensor, role, holders))
    if (way := way_of(parts.device_mesh, parts.placements, where=array, job=job, holders=holders)) is None:
        return ()
    box, mesh, placements = way.box(parts.shape, rank=job.rank), way.mesh, way.placements
    if not is_composite(parts.local):
        elements = elements_of(_of_shape(parts.local, box), where=array)
        spec = ArraySpec(array, (*parts.shape, *elements.tail), elements.dtype)
        found = (spec, _with_tail(box, elements.tail), elements.tensor, role)
        return (HeldArray(*found, "placed", mesh, placements, attributes=elements.attributes, order=elements.order),)
    cuts = _cuts(parts, placements, mesh.sizes)
    if cuts is None:
        raise LayoutUnsupported(
            f"tensor {array}: a {type(parts.local).__name__} that is sharded as {placements} over {mesh.sizes} ranks, and "
            f"whose parts are not cut as its rows are: their place in the whole is not known"
        )
    return tuple(_hold_parts(array, parts, cuts, box=box, role=role, mesh=mesh, placements=placements))


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """How DTensors lie: on their `own` mesh, cut as `cuts` say; `mesh` and `placements` name the axes too that repeat them."""

    own: Mesh
    cuts: tuple[str, ...]
    mesh: Mesh
    placements: tuple[str, ...]

    def box(self, shape: Sequence[int], *, rank: int) -> Box:
        """Where this rank's part of such a tensor lies in the whole, which has this shape."""
        return physical_box(shape, sizes=self.own.sizes, coordinate=self.own.coordinate(rank), placements=self.cuts)


def way_of(device_mesh: DeviceMesh, placements: Sequence[Any], *, where: object, job: JobView, holders: Holders) -> Way | None:
    """How DTensors on this mesh lie; None on a rank outside of it. Raises LayoutUnsupported as `hold`."""
    alike = device_mesh, tuple(placements), tuple(map(type, placements)), holders.ranks
    if (known := job.ways.get(alike)) is not None:
        return known
    if job.rank not in (own := mesh_of(device_mesh, world_size=job.world_size)).ranks:
        return None
    cuts = spell_placements(placements, own.sizes, where=where)
    if not set(holders.ranks) <= set(own.ranks):  # follows from the root mesh too, which equal meshes need not have in common
        wide = widened(device_mesh, cuts, replicas=holders.ranks, rank=job.rank, world_size=job.world_size)
        return Way(own, cuts, *(wide or (own, cuts)))
    job.ways[alike] = way = Way(own, cuts, own, cuts)
    return way


def box_of(parts: DTensorParts) -> Box:
    """Where this rank's part of a DTensor lies in the whole."""
    sizes = tuple(parts.device_mesh.shape)
    placements = spell_placements(parts.placements, sizes, where="a parameter")
    return physical_box(parts.shape, sizes=sizes, coordinate=parts.device_mesh.get_coordinate() or (), placements=placements)


def has_place(tensor: torch.Tensor, *, job: JobView) -> bool:
    """Whether the parts of a DTensor have a place in the whole: of a plain one they have, of a composite one its class says."""
    parts = placed(settled(tensor))
    if parts is None or not is_composite(parts.local):
        return True
    mesh = mesh_of(parts.device_mesh, world_size=job.world_size)
    if job.rank not in mesh.ranks:
        return True
    return _cuts(parts, spell_placements(parts.placements, mesh.sizes, where="state"), mesh.sizes) is not None


def is_even(parts: DTensorParts) -> bool:
    """Whether all ranks of its mesh hold equally many rows of it, none of them none, and whole rows."""
    ways = 1
    for size, placement in zip(parts.device_mesh.shape, parts.placements, strict=True):
        if not placement.is_replicate():
            if getattr(placement, "dim", None) != 0:
                return False
            ways *= size
    return bool(parts.shape) and parts.shape[0] > 0 and parts.shape[0] % ways == 0


def _cuts(parts: DTensorParts, placements: Sequence[str], sizes: Sequence[int]) -> Mapping[Path, CompositeCut] | None:
    """How each part of a composite shard is cut; None where that is not known, or ranks may hold other kinds of parts."""
    leaves = leaves_of(parts.local)
    if all(leaf.shape == parts.local.shape for _, leaf in leaves):
        return {path: "same" for path, _ in leaves}
    if all(size == 1 or placement == "R" for size, placement in zip(sizes, placements, strict=True)):
        return {path: "fixed" for path, _ in leaves}
    cuts = cuts_of(parts.local)
    return None if cuts is None or not is_even(parts) else cuts.by_path


def hold_for_loading(array: ArrayId, tensor: torch.Tensor, *, job: JobView) -> tuple[HeldArray, ...] | None:
    """The parts of a composite DTensor as targets, also where ranks hold unevenly many rows; None where its class does not say
    how they are cut."""
    parts = placed(settled(tensor))
    if parts is None or (cuts := cuts_of(parts.local)) is None:
        return None
    mesh = mesh_of(parts.device_mesh, world_size=job.world_size)
    placements = spell_placements(parts.placements, mesh.sizes, where=array)
    by_path = cuts.by_path
    return tuple(_hold_parts(array, parts, by_path, box=box_of(parts), role="parameter", mesh=mesh, placements=placements))


def placed_as(parts: DTensorParts, local: torch.Tensor) -> torch.Tensor:
    """A DTensor of this local tensor, placed as another one, whose shape it has."""
    from torch.distributed.tensor import DTensor  # loaded already: there is one

    stride = torch.empty(parts.shape, device="meta").stride()
    return DTensor.from_local(
        local, parts.device_mesh, parts.placements, run_check=False, shape=torch.Size(parts.shape), stride=stride
    )


def _hold_parts(
    array: ArrayId,
    parts: DTensorParts,
    cuts: Mapping[Path, CompositeCut],
    *,
    box: Box,
    role: Role,
    mesh: Mesh,
    placements: tuple[str, ...],
) -> Iterator[HeldArray]:
    """The parts of a composite shard, each where it lies in the part of the whole. [UCF-109]

    Of what is the same in every shard nobody declares that it is: ranks are compared, as a class may scale each shard alone.
    """
    composition = composition_of(parts.local, where=array, shape=parts.shape)
    for path, leaf in leaves_of(parts.local):
        elements = elements_of(leaf if cuts[path] != "same" else _of_shape(leaf, box), where=array)
        shape, own = place_of_part(tuple(leaf.shape), cuts[path], parts.shape, box)
        spec = ArraySpec(part_id(array, path), (*shape, *elements.tail), elements.dtype)
        found = (spec, _with_tail(own, elements.tail), elements.tensor)
        attributes = (*attributes_of(composition, path), *elements.attributes)
        if cuts[path] == "fixed" and any(
            size > 1 and placement != "R" for size, placement in zip(mesh.sizes, placements, strict=True)
        ):
            yield HeldArray(*found, "other", "undeclared", attributes=attributes, order=elements.order)
        else:
            yield HeldArray(*found, role, "placed", mesh, placements, attributes=attributes, order=elements.order)


def place_of_part(part: tuple[int, ...], cut: CompositeCut, whole: tuple[int, ...], box: Box) -> tuple[tuple[int, ...], Box]:
    """The shape of the whole's part, and this shard's box in it."""
    if cut == "same":
        return whole, box
    if cut == "fixed":
        return part, Box.whole(part)
    low, high, rest = box.start[0] * cut, box.stop[0] * cut, part[1:]
    return (int(whole[0] * cut), *rest), Box((int(low), *(0 for _ in rest)), (int(high), *rest))


def _hold_plain(array: ArrayId, tensor: torch.Tensor, role: Role, holders: Holders) -> Iterator[HeldArray]:
    composition = composition_of(tensor, where=array) if is_composite(tensor) else None
    for path, inner in leaves_of(tensor):
        if inner is not tensor and placed(inner) is not None:
            raise LayoutUnsupported(f"tensor {array}: {type(tensor).__name__} holds a DTensor inside, as {'.'.join(path)!r}")
        elements = elements_of(inner, where=array)
        spec = ArraySpec(part_id(array, path), (*inner.shape, *elements.tail), elements.dtype)
        yield HeldArray(
            spec,
            Box.whole(spec.shape),
            elements.tensor,
            role,
            holders.sharing,
            replicas=holders.ranks,
            attributes=(*(attributes_of(composition, path) if composition else ()), *elements.attributes),
            kept=holders.kept,
            order=elements.order,
        )


def part_id(array: ArrayId, path: Path) -> ArrayId:
    """The array of one part of a composite tensor: `value` -> `value.codes`; in `extra`, `a/b` -> `a/b/codes`. [UCF-108]"""
    if not path:
        return array
    if array.section == "params":
        return replace(array, state=".".join((array.state, *path)))
    return replace(array, name="/".join((*((array.name,) if array.name else ()), *map(token, path))))


def whole_id(part: ArrayId, path: Path) -> ArrayId:
    """The composite tensor that an array is the part of: the reverse of `part_id`."""
    if part.section == "params":
        return replace(part, state=part.state.removesuffix("." + ".".join(path)))
    suffix = "/".join(map(token, path))
    return replace(part, name="" if part.name == suffix else part.name.removesuffix("/" + suffix))


def _of_shape(local: torch.Tensor, box: Box) -> torch.Tensor:
    """`local`, or for an empty shard (torch leaves its other axes at any extent) an empty tensor of the box's shape."""
    if box.count == 0 == local.numel() and tuple(local.shape) != box.shape:
        return local.new_empty(box.shape)
    return local


def _with_tail(box: Box, tail: tuple[int, ...]) -> Box:
    return Box((*box.start, *(0 for _ in tail)), (*box.stop, *tail)) if tail else box
