"""Which wrapper or parallelism a module stands under, and what follows for the tensors in it; torch's device meshes as named
meshes of ranks, and its placements as the format spells them.

All of it is read from objects that training has made; nothing here communicates, and nothing changes a module except
`reshard`, which training itself does after every backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed import ProcessGroup, get_process_group_ranks

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.arrays import Mesh
from elastickpt.training.elements import is_loaded_instance, loaded_module, loaded_type
from elastickpt.training.held import Kept

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def mesh_of(device_mesh: DeviceMesh, *, world_size: int) -> Mesh:
    """The mesh with this rank in it (or, for a rank outside, the mesh as it was made), over global ranks.

    Its name is its axes' names joined by ".", "mesh" when they have none, with "@<first>-<last>" when it leaves ranks
    out.
    """
    return _mesh_of(device_mesh, device_mesh.get_rank(), world_size)


@lru_cache(maxsize=64)  # each FSDP2 parameter has a mesh of its own, equal to its neighbours'
def _mesh_of(device_mesh: DeviceMesh, rank: int, world_size: int) -> Mesh:
    # `rank` is in the key only: equal slices of one root mesh lie over other ranks in another rank's process.
    ranks = tuple(int(rank) for rank in device_mesh.mesh.flatten().tolist())
    names = device_mesh.mesh_dim_names
    sizes = tuple(int(size) for size in device_mesh.mesh.shape)
    axes = tuple(names) if names else tuple(f"d{k}" for k in range(len(sizes)))
    return Mesh(_named(".".join(names) if names else "mesh", ranks, world_size), axes, sizes, ranks)


def _named(name: str, ranks: tuple[int, ...], world_size: int) -> str:
    return name if len(ranks) == world_size else f"{name}@{min(ranks)}-{max(ranks)}"


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


def widened(
    device_mesh: DeviceMesh, placements: tuple[str, ...], *, replicas: tuple[int, ...], rank: int, world_size: int
) -> tuple[Mesh, tuple[str, ...]] | None:
    """A DTensor's mesh and placements with those axes of its root mesh added along which `replicas` repeat it.

    Before -> after, for `tp` of a root mesh `dp, tp` under DDP over `dp`: (tp), S(0) -> (dp, tp), R S(0).
    None where the replicas are no axes of the root mesh: ranks outside the DTensor's own mesh then stay undeclared.
    """
    own = mesh_of(device_mesh, world_size=world_size)
    root = mesh_of(device_mesh._get_root_mesh(), world_size=world_size)
    if not {*replicas, rank} <= set(root.ranks) or not set(own.axes) <= set(root.axes):
        return None
    here = root.coordinate(rank)
    others = [root.coordinate(other) for other in replicas]
    varying = {k for k, _ in enumerate(root.axes) if any(other[k] != here[k] for other in others)}
    if set(_spanned(root, varying, here)) != set(replicas):
        return None
    placement = dict(zip(own.axes, placements, strict=True))
    kept = tuple(k for k, axis in enumerate(root.axes) if axis in placement or k in varying)
    axes = tuple(root.axes[k] for k in kept)
    ranks = _spanned(root, set(kept), here)
    mesh = Mesh(_named(".".join(axes), ranks, world_size), axes, tuple(root.sizes[k] for k in kept), ranks)
    return mesh, tuple(placement.get(axis, "R") for axis in axes)


def _spanned(root: Mesh, axes: set[int], here: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks that differ from the one at `here` along `axes` only, in order."""
    fixed = [k for k in range(len(root.axes)) if k not in axes]
    return tuple(rank for rank in root.ranks if all(root.coordinate(rank)[k] == here[k] for k in fixed))


_DDP = ("torch.nn.parallel.distributed", "DistributedDataParallel")
_FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
_FSDP_STATE = "torch.distributed.fsdp._fully_shard._fsdp_state"
_STAGE = ("torch.distributed.pipelining.stage", "_PipelineStageBase")


def is_stage(value: object) -> bool:
    """Whether `value` is a stage of `torch.distributed.pipelining`."""
    return is_loaded_instance(value, *_STAGE)


def module_of(value: object) -> nn.Module:
    """The module of a pipeline stage, or the module itself. Raises LayoutUnsupported for anything else."""
    module = getattr(value, "submod", None) if is_stage(value) else value
    if not isinstance(module, nn.Module):
        raise LayoutUnsupported(f"expected an nn.Module or a pipeline stage, found {type(value).__name__}")
    return module


def data_parallel_ranks(
    wrappers: Iterable[nn.Module], tensor: torch.Tensor, *, name: str, ignored: dict[int, frozenset[int]]
) -> tuple[int, ...]:
    """Global ranks, ascending, on which DDP keeps `tensor` equal; () without a DDP, or where DDP ignores it.

    `name` is canonical, for messages; `ignored` keeps, by id of a DDP, the ids of what that ignores. Raises LayoutUnsupported
    under an FSDP1 wrapper that shards: its flat shards are no boxes.
    """
    ranks: set[int] = set()
    for wrapper in wrappers:
        if is_loaded_instance(wrapper, *_FSDP1):
            _refuse_flat_shards(wrapper, name)
        if not is_loaded_instance(wrapper, *_DDP):
            continue
        if id(wrapper) not in ignored:
            ignored[id(wrapper)] = _ignored(wrapper)
        if id(tensor) not in ignored[id(wrapper)]:
            group = wrapper.process_group
            ranks.update(get_process_group_ranks(group) if isinstance(group, ProcessGroup) else ())
    return tuple(sorted(ranks))


def buffers_kept(wrappers: Iterable[nn.Module], *, sharded: bool) -> Kept:
    """What keeps buffers under these wrappers equal: DDP alone does, unless it was told not to."""
    ddps = [wrapper for wrapper in wrappers if is_loaded_instance(wrapper, *_DDP)]
    return "broadcast" if not sharded and any(getattr(ddp, "broadcast_buffers", True) for ddp in ddps) else "loose"


def sharding_ranks(module: nn.Module, *, world_size: int) -> Mapping[int, tuple[int, ...]]:
    """id(module) -> the global ranks, ascending, that `fully_shard` trains it on, for all modules at and below one that it
    manages: those of the mesh of the innermost; () for others."""
    found: dict[int, tuple[int, ...]] = {}
    if loaded_module(_FSDP_STATE) is not None:
        _spread(module, (), found, world_size)
    return found


def _spread(module: nn.Module, above: tuple[int, ...], found: dict[int, tuple[int, ...]], world_size: int) -> None:
    if id(module) in found:
        return
    state = _fsdp_state_of(module)
    groups = _groups_of(state)
    if state is not None and not groups and not above:  # all of its parameters are managed by modules below
        groups = list(_fsdp_groups(module))
    meshes = sorted((mesh_of(group.mesh_info.mesh, world_size=world_size).ranks for group in groups), key=len)
    found[id(module)] = ranks = tuple(sorted(meshes[-1])) if meshes else above
    for child in module.children():
        _spread(child, ranks, found, world_size)


def _ignored(ddp: nn.Module) -> frozenset[int]:
    names = getattr(ddp, "parameters_to_ignore", ())
    if not names:
        return frozenset()
    inner = ddp.get_submodule("module")
    both = (*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False))
    return frozenset(id(tensor) for name, tensor in both if name in names)


def _refuse_flat_shards(wrapper: nn.Module, name: str) -> None:
    strategy = getattr(getattr(wrapper, "sharding_strategy", None), "name", "")
    if strategy != "NO_SHARD":
        raise LayoutUnsupported(
            f"parameter {name!r} stands under FullyShardedDataParallel ({strategy or 'unknown strategy'}), whose flat "
            f"shards have no place in the whole tensor; use torch.distributed.fsdp.fully_shard"
        )


def sharded_parameters(module: nn.Module) -> Mapping[tuple[int, str], nn.Parameter]:
    """(id of the owner, attribute) -> the sharded parameter, for all that `fully_shard` manages below `module`.

    While such a module is unsharded (after a forward with `reshard_after_forward=False`), the gathered copy is
    registered in its place; the sharded one stays what the optimizer holds, and shares its memory with the next gather.
    """
    found: dict[tuple[int, str], nn.Parameter] = {}
    for parameter in _fsdp_parameters(module):
        info, sharded = parameter._module_info, parameter.sharded_param
        found[id(info.module), info.param_name] = sharded
        for owner, attribute in zip(info.shared_modules, info.shared_param_names, strict=True):
            found[id(owner), attribute] = sharded
    return found


def reshard(module: nn.Module) -> None:
    """Frees gathered parameters below `module`: the next forward then gathers what was loaded into the shards.

    Local, and a no-op for modules that `fully_shard` does not manage or that are sharded already.
    """
    for group in _fsdp_groups(module):
        group._to_sharded()


def gathered_parameters(module: nn.Module) -> Iterator[torch.Tensor]:
    """What FSDP2 gathers shards into, below `module`: graphs of forwards keep these tensors, and each gather refills them."""
    for parameter in _fsdp_parameters(module):
        gathered = getattr(parameter, "_unsharded_param", None)  # there from the first gather on
        if gathered is not None:
            yield gathered


def _fsdp_groups(module: nn.Module) -> Iterator[Any]:
    if loaded_module(_FSDP_STATE) is None:
        return
    seen: set[int] = set()
    for submodule in module.modules():
        state = _fsdp_state_of(submodule)
        if state is not None and id(state) not in seen:
            seen.add(id(state))
            yield from _groups_of(state)


def _fsdp_state_of(module: nn.Module) -> Any:
    state_of = getattr(loaded_module(_FSDP_STATE), "_get_module_fsdp_state", None)
    return None if state_of is None else state_of(module)


def _groups_of(state: Any) -> list[Any]:
    if state is None:
        return []
    many = getattr(state, "_fsdp_param_groups", None)  # one group for each mesh, since torch 2.12
    return [group for group in ((state._fsdp_param_group,) if many is None else many) if group is not None]


def _fsdp_parameters(module: nn.Module) -> Iterator[Any]:
    for group in _fsdp_groups(module):
        yield from group.fsdp_params
