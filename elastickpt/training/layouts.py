"""Whether ranks hold now what they held when a checkpoint was written."""

from __future__ import annotations

from collections.abc import Mapping

from elastickpt.format.arrays import Mesh
from elastickpt.training.dtensors import Job
from elastickpt.training.held import HeldArray
from elastickpt.training.identities import Identities
from elastickpt.training.kinds import kinds_of
from elastickpt.training.modules import hold_module


def held_by_models(state: Mapping[str, object], *, rank: int, world_size: int, declared: Mesh | None) -> tuple[HeldArray, ...]:
    """What the models of `state` hold on this rank: the layout of a job is that of its parameters. Local, no I/O."""
    kinds = kinds_of(state)
    job, identities = Job(rank, world_size, declared), Identities()
    return tuple(
        held
        for key, model in state.items()
        if kinds[key] == "model"
        for held in hold_module(key, model, job=job, identities=identities).arrays
    )
