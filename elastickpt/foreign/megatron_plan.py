"""Megatron-LM's legacy layout, to be written: a file for each rank, and the tracker that names the step. [FOR-57..59]"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from elastickpt.errors import Refused, StructureConflict
from elastickpt.foreign.file_plans import FilePlan, NewTensor, constant_file
from elastickpt.foreign.formats import MEGATRON_TRACKER
from elastickpt.foreign.listing import ParamGroup
from elastickpt.foreign.pickle_values import Instance
from elastickpt.foreign.plain_values import from_plain
from elastickpt.foreign.torch_archive import plan_torch_archive

OF_STAGES = (  # entries of `args` that say how layers are cut into stages
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
)
CHECKPOINT_VERSION = 3.0  # of files in which a rank's query, key and value rows are those of whole groups


@dataclass(frozen=True, slots=True)
class NewRank:
    """What one rank's file shall hold.

    `chunks` are the rank's model chunks, one without virtual stages: names in the file's order, None for an entry that holds no
    tensor. `states` go by the optimizer's number; `masters` too, and make it an optimizer of half types. `values` are those of
    the file's further keys, `args` a mapping of the names in it, the sizes of the mesh aside.
    """

    pp: int
    tp: int
    chunks: tuple[Mapping[str, NewTensor | None], ...]
    states: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    groups: tuple[ParamGroup, ...] = ()
    masters: Mapping[int, NewTensor] = field(default_factory=dict)
    args: Mapping[str, object] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)


def plan_megatron_legacy(ranks: Iterable[NewRank], *, step: int) -> tuple[FilePlan, ...]:
    """The files of all ranks, and the tracker. Raises StructureConflict unless they are a whole grid of (pp, tp)."""
    found = {(rank.pp, rank.tp): rank for rank in ranks}
    stages, ways = (1 + max((place[k] for place in found), default=-1) for k in (0, 1))
    if sorted(found) != [(pp, tp) for pp in range(stages) for tp in range(ways)] or not found:
        raise StructureConflict(f"ranks at (pp, tp) {sorted(found)} are no whole grid")
    if step < 0:
        raise Refused(f"step {step}: expected a number of completed steps")
    folder = f"iter_{step:07d}"
    files = tuple(
        plan_torch_archive(f"{folder}/{_folder(pp, tp, stages)}/model_optim_rng.pt", _contents(rank, step, stages, ways))
        for (pp, tp), rank in sorted(found.items())
    )
    return (*files, constant_file(MEGATRON_TRACKER, str(step).encode()))


def _folder(pp: int, tp: int, stages: int) -> str:
    return f"mp_rank_{tp:02d}" if stages == 1 else f"mp_rank_{tp:02d}_{pp:03d}"


def _contents(rank: NewRank, step: int, stages: int, ways: int) -> dict[str, object]:
    virtual = len(rank.chunks) if len(rank.chunks) > 1 else None
    workers = rank.args.get("data_parallel_size", 1)
    sizes = {
        "tensor_model_parallel_size": ways,
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": virtual,
        "world_size": stages * ways * (workers if isinstance(workers, int) else 1),
        "rank": rank.pp * ways * (workers if isinstance(workers, int) else 1) + rank.tp,
        "iteration": step,
    }
    args = Instance("argparse.Namespace", (), {**{name: from_plain(one) for name, one in rank.args.items()}, **sizes})
    made: dict[str, object] = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": step}
    for number, chunk in enumerate(rank.chunks):
        made[f"model{number}" if virtual else "model"] = dict(chunk)
    rest = {name: from_plain(one) for name, one in rank.values.items() if name not in made}
    beside = rest.pop("optimizer", {})
    if rank.groups:
        made["optimizer"] = _optimizer(rank, beside if isinstance(beside, dict) else {})
    return {**made, **rest}


def _optimizer(rank: NewRank, beside: Mapping[object, object]) -> dict[object, object]:
    groups = [
        {**{name: from_plain(one) for name, one in group.options.items()}, "params": list(group.members)}
        for group in rank.groups
    ]
    inner: dict[object, object] = {
        "state": {number: dict(states) for number, states in rank.states.items()},
        "param_groups": groups,
    }
    if not rank.masters and not beside:
        return inner
    made: dict[object, object] = {"optimizer": inner, **beside}
    if rank.masters:
        made["fp32_from_fp16_params"] = [
            [rank.masters[number] for number in group.members if isinstance(number, int)] for group in rank.groups
        ]
    return made
