"""Train a small language model on the standard library's sources, at any layout, and go on after any crash.

    python examples/train.py --root out/run                                                   # one process
    torchrun --nproc-per-node=4 examples/train.py --root out/run --layout pp2.fsdp2           # four

A layout names the axes of the mesh, slowest first: pp (pipeline stages), fsdp (fully sharded data parallel), tp (tensor
parallel). Started again with the same --root, at the same layout or another, it goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from llama import Config, Transformer, loss_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import elastickpt as ek

BATCH = 12  # sequences a step, over all ranks: splits evenly over 1, 2, 3, 4 and 6 data-parallel ranks
MICROBATCHES = 3  # into which a pipeline cuts a rank's share of them
LR = 3e-3


class Corpus:
    """The sources of the running Python's standard library. A step's batch depends on nothing but the step."""

    def __init__(self, limit_nbytes: int = 4 << 20) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)[:limit_nbytes]
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def batch(self, step: int, *, context: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `step` for one of `ranks` data-parallel ranks, each [BATCH / ranks, context]."""
        starts = torch.randint(len(self.text) - context, (BATCH, 1), generator=torch.Generator().manual_seed(step))
        rows = self.text[starts + torch.arange(context + 1)].long().chunk(ranks)[rank]
        return rows[:, :-1], rows[:, 1:]


def axes_of(layout: str) -> dict[str, DeviceMesh]:
    """The axes of the mesh by name: pp and fsdp, each of size 2, for "pp2.fsdp2". "single" has none."""
    if not re.fullmatch(r"single|(pp|fsdp|tp)\d+(\.(pp|fsdp|tp)\d+)*", layout):
        raise SystemExit(f"layout {layout!r}: expected 'single', or axes as in 'pp2.fsdp2' out of pp, fsdp and tp")
    sizes = {axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", layout)}
    if math.prod(sizes.values()) != int(os.environ.get("WORLD_SIZE", "1")):
        raise SystemExit(f"layout {layout!r} is for {math.prod(sizes.values())} ranks, not what this job was started with")
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes)) if sizes else None
    return {axis: mesh[axis] for axis in sizes} if mesh else {}


def path_in(axis: DeviceMesh | None) -> tuple[int, int]:
    """This rank's place in an axis, and the axis's size."""
    return (axis.get_local_rank(), axis.size()) if axis else (0, 1)


def shard(model: Transformer, axes: dict[str, DeviceMesh]) -> None:
    """Apply tensor parallelism, then fully sharded data parallelism, to this rank's stage."""
    if "tp" in axes:
        styles: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in ("wq", "wk", "wv", "gate", "up")}
        styles |= {name: RowwiseParallel() for name in ("wo", "down")}
        styles |= {"embed": RowwiseParallel(input_layouts=Replicate())}
        styles |= {"head": ColwiseParallel(output_layouts=Replicate())}
        matrices = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Embedding)]
        parallelize_module(model, axes["tp"], {name: styles[name.rpartition(".")[2]] for name in matrices})
    if "fsdp" in axes:
        for part in (*model.layers.values(), model):
            fully_shard(part, mesh=axes["fsdp"])


def pipeline(model: Transformer, pp: DeviceMesh, c: Config, rows: int) -> Schedule1F1B:
    """The schedule of this rank's stage for `rows` sequences a step.

    Shapes are given, not inferred: inferring runs a forward and a backward pass, by which FSDP stages lose gradients.
    """
    stage, stages = path_in(pp)
    tokens = torch.empty(rows // MICROBATCHES, c.context, dtype=torch.long)
    hidden = torch.empty(*tokens.shape, c.dim, requires_grad=True)
    logits = torch.empty(*tokens.shape, c.vocab, requires_grad=True)
    inputs, outputs = tokens if stage == 0 else hidden, logits if stage == stages - 1 else hidden
    part = PipelineStage(model, stage, stages, torch.device("cpu"), inputs, outputs, group=pp.get_group())
    return Schedule1F1B(part, MICROBATCHES, loss_fn=loss_of)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small language model at any layout.")
    parser.add_argument("--root", type=Path, required=True, help="folder of the checkpoints and of a log per rank")
    parser.add_argument("--layout", default="single", help="for example pp2.fsdp2, tp2, fsdp3, single")
    parser.add_argument("--steps", type=int, default=80, help="steps of the whole run, which the learning rate spans")
    parser.add_argument("--until", type=int, help="stop after this step of the run (default: the last one)")
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--take-over", action="store_true", help="also from a job that lives")
    parser.add_argument("--seam", type=Path, help="save what was loaded again, at once, in this folder, to compare them")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.root.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    axes = axes_of(args.layout)
    (stage, stages), (share, shares) = path_in(axes.get("pp")), path_in(axes.get("fsdp"))
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if axes else (0, 1)

    def log(event: str, **fields: object) -> None:
        with open(args.root / f"log-{rank}.jsonl", "a") as file:
            file.write(json.dumps({"event": event, "layout": args.layout, "time": time.time()} | fields) + "\n")

    log("start", pid=os.getpid())
    c, corpus = Config(), Corpus()
    model = Transformer(c, stage=stage, stages=stages)
    shard(model, axes)
    schedule = pipeline(model, axes["pp"], c, BATCH // shares) if stages > 1 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=args.steps + 1, pct_start=0.1)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": ek.RNG()}

    options = ek.RunOptions(due=ek.Every(steps=args.save_every), take_over=args.take_over)
    run = ek.Run(args.root, state, options=options)
    begin = time.perf_counter()
    start, until = run.restore(), args.until or args.steps
    if start.path:
        log("load", step=start.step, folder=start.path, seconds=time.perf_counter() - begin)
        if args.seam:
            ek.save(state, args.seam / f"step-{start.step:04d}", step=start.step)
            log("seam", step=start.step, folder=str(args.seam))

    def saved(handle: ek.SaveHandle) -> None:  # on another thread, when the checkpoint exists
        if handle.exception() is None:
            info = handle.result()
            durable = info.stall_s + info.plan_s + info.write_s + info.commit_s
            log("save", step=info.step, folder=info.path, seconds=info.stall_s, durable=durable)

    for step in range(start.step, until):
        inputs, targets = corpus.batch(step, context=c.context, rank=share, ranks=shares)
        losses: list[Tensor] = []  # of the microbatches; none but on the last stage
        if schedule:
            first = (inputs,) if stage == 0 else ()  # the other stages' inputs come from the stage before
            schedule.step(*first, target=targets, losses=losses, return_outputs=False)
        else:
            losses.append(loss_of(model(inputs), targets))
            torch.autograd.backward(losses)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        if axes:
            dist.all_reduce(loss)
        log("step", step=step + 1, loss=loss.item() * stages / ranks)
        if run.due(step + 1) or step + 1 == until:
            run.save(step + 1, metrics={"loss": loss.item() * stages / ranks}).add_done_callback(saved)
        if run.ending:  # a notice came, as before the end of a spot instance: what is saved is the last
            break
    run.close()
    if axes:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
