"""torch's device meshes as named meshes of ranks."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from elastickpt.format.arrays import Mesh

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
