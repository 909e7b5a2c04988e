"""Steps of one small model at twelve layouts, on batches that are the same at each. Imported by rank processes.

The model is that of `layouts` without what depends on how a batch is split: batch norm. Its tensor-parallel layers hand each
other DTensors: torch takes a plain local tensor for an even cut, and refuses a forward pass over an uneven one (TP4).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from layouts import BLOCKS, CASES, WIDTH, Block, _fsdp, adam
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

BATCH = 12
MICROBATCHES = 3  # into which a pipeline cuts a rank's share of a batch
DTYPES = {"float32": torch.float32, "float64": torch.float64}
AXES = {  # of the mesh, slowest first; others: none
    "fsdp2": ("dp",), "fsdp3": ("dp",), "fsdp4": ("dp",), "hsdp2x2": ("replicate", "shard"), "tp2": ("tp",), "tp4": ("tp",),
    "tp2fsdp2": ("dp", "tp"), "pp2": ("pp",), "pp2fsdp2": ("pp", "dp"), "pp2tp2": ("pp", "tp"),
}  # fmt: skip
TP_PLAN = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
DATA_PARALLEL = {"ddp2": 2, "fsdp2": 2, "fsdp3": 3, "fsdp4": 4, "hsdp2x2": 4, "tp2fsdp2": 2, "pp2fsdp2": 2}  # others: 1
NUMBERS = (2, 3, 4)  # the batches after the save


class Plain(nn.Module):
    """The blocks of a stage, which keep their numbers in the whole model."""

    embed = head = None

    def __init__(self, blocks: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict()
        for number in blocks:
            torch.manual_seed(5 + number)
            self.blocks[str(number)] = Block()
            self.blocks[str(number)].norm = nn.LayerNorm(WIDTH)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


class Steps:
    """A model and its optimizer at one layout, which take steps by batch number."""

    def __init__(self, name: str, rank: int, dtype: torch.dtype) -> None:
        self.case, self.dtype = CASES[name], dtype
        per_stage = self.case.world // self.case.stages
        self.shares = DATA_PARALLEL.get(name, 1)
        self.alike = per_stage // self.shares  # ranks that compute the same rows
        self.stage, self.share = rank // per_stage, rank % per_stage // self.alike
        self.pp: dist.ProcessGroup | None = None
        self.model = self._sharded(name, Plain(self._blocks(), dtype))
        self.optimizer = adam(self.model)
        self.squares: list[torch.Tensor] = []
        self.schedule = self._pipeline() if self.pp else None

    def _blocks(self) -> tuple[int, ...]:
        return tuple(range(BLOCKS)) if self.case.stages == 1 else (self.stage,)

    def _sharded(self, name: str, model: Plain) -> nn.Module:
        if name == "ddp2":
            return DistributedDataParallel(model)
        axes = AXES.get(name, ())
        sizes = (self.case.world,) if len(axes) == 1 else (2, 2)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=axes) if axes else None
        if mesh and "tp" in axes:
            for block in model.blocks.values():
                parallelize_module(block, mesh["tp"], TP_PLAN)
        if mesh and {"dp", "shard"} & set(axes):
            _fsdp(model, mesh if "shard" in axes else mesh["dp"])  # type: ignore[arg-type]
        self.pp = mesh["pp"].get_group() if mesh and "pp" in axes else None
        return model

    def _pipeline(self) -> ScheduleGPipe:
        """Shapes are given, not inferred: inferring runs a pass, by which FSDP stages lose gradients."""
        rows = torch.empty(BATCH // self.shares // MICROBATCHES, WIDTH, dtype=self.dtype)
        hidden = rows.clone().requires_grad_()
        arguments = (rows if self.stage == 0 else hidden, hidden)
        part = PipelineStage(self.model, self.stage, self.case.stages, torch.device("cpu"), *arguments, group=self.pp)
        return ScheduleGPipe(part, MICROBATCHES, loss_fn=self._loss)

    def _loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.squares.append((output.detach().double() - target.double()).square().sum())
        return (output - target).square().mean()

    def step(self, number: int) -> float:
        """One step on batch `number`; the loss over the whole batch, its squares summed in float64."""
        source = torch.Generator().manual_seed(number)
        whole = torch.randn(2, BATCH, WIDTH, generator=source, dtype=torch.float64).to(self.dtype)
        data, target = whole.chunk(self.shares, dim=1)[self.share]
        self.squares.clear()
        if self.schedule:
            self.schedule.step(*((data,) if self.stage == 0 else ()), target=target)
        else:
            self._loss(self.model(data), target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        total = torch.stack(self.squares).sum() if self.squares else torch.zeros((), dtype=torch.float64)
        if self.case.world > 1:
            dist.all_reduce(total)
        return float(total) / (BATCH * WIDTH * self.alike)


def train_and_save(rank: int, world_size: int, name: str, folder: str, labels: tuple[str, ...]) -> dict[str, list[float]]:
    """Two steps, a save below `folder`, three more: the losses after the save, by these dtypes."""
    import elastickpt as ek

    found = {}
    for label in labels:
        run = Steps(name, rank, DTYPES[label])
        for number in (0, 1):
            run.step(number)
        ek.save({"model": run.model, "optimizer": run.optimizer}, f"{folder}/{label}", step=2)
        found[label] = [run.step(number) for number in NUMBERS]
    return found


def resume(
    rank: int,
    world_size: int,
    name: str,
    folders: list[str],
    labels: tuple[str, ...],
    parts: tuple[str, ...] = ("model", "optimizer"),
) -> dict[str, dict[str, list[float]]]:
    """folder → dtype → the losses of three steps after loading these parts of what was saved there into this layout."""
    import elastickpt as ek

    found: dict[str, dict[str, list[float]]] = {folder: {} for folder in folders}
    for label in labels:
        for folder in folders:
            run = Steps(name, rank, DTYPES[label])
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.zero_()
            live = {"model": run.model, "optimizer": run.optimizer}
            strict = "all" if len(parts) == len(live) else "missing"
            ek.load({part: live[part] for part in parts}, f"{folder}/{label}", strict=strict)
            found[folder][label] = [run.step(number) for number in NUMBERS]
    return found
