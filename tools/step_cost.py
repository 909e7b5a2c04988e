"""What a step of the trainer costs beside the same two schedules in a plain script of torch: the demo's model, nothing lost.

    python -m tools.step_cost [--steps 60] [--turns 5]      six stages of `examples/lose_a_stage.py`; the two run by turns

The plain script has torch's own pipeline stages and schedules over gloo, in the normal and in the swapped order. It sums the
gradients of the ends' replicas and clips each part by its own norm, as the trainer does; it has no decision, no digest and no
copy of buffers. Prints the median step of each turn, and the ratio of the medians. Both must come to the same loss, else the
exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import elastickpt as ek
from tools.bench import machine
from tools.gloo_ranks import run_ranks
from tools.kill_times import EXAMPLE, LAUNCH

sys.path.insert(0, str(EXAMPLE.parent))
import llama
import lose_a_stage as demo

STAGES, WARM = 6, 10
CONFIG = llama.Config(dim=64, layers=12, heads=4, kv_heads=2, hidden=192, context=64)
ROWS = demo.SEQUENCES // demo.MICROBATCHES
HIDDEN = torch.empty(ROWS, CONFIG.context, CONFIG.dim, device="meta")


@dataclass(frozen=True, slots=True)
class Turn:
    """The seconds of each step but the first ones, on stage 0, and the loss of the last one."""

    seconds: list[float]
    loss: float

    @property
    def median_ms(self) -> float:
        return 1000 * statistics.median(self.seconds)


class Way:
    """Some microbatches' way through one rank, in one order of the stages, by torch's own schedule over gloo."""

    def __init__(self, part: demo.Part, order: list[int], numbers: list[int]) -> None:
        rank, world = dist.get_rank(), len(order)
        at = order.index(rank)
        self.first, self.last, self.numbers = at == 0, at == world - 1, numbers
        passed = (part.embed if self.first else None, part.body, part.head if self.last else None)
        rows, time_, vocab = ROWS, CONFIG.context, CONFIG.vocab
        tokens = torch.empty(rows, time_, dtype=torch.int64, device="meta")
        hidden = torch.empty(rows, time_, CONFIG.dim, device="meta", requires_grad=True)
        logits = torch.empty(rows, time_, vocab, device="meta", requires_grad=True)
        piped = PipelineStage(
            nn.Sequential(*(one for one in passed if one is not None)),
            at,
            world,
            torch.device("cpu"),
            input_args=(tokens if self.first else hidden,),
            output_args=(logits if self.last else hidden,),
        )
        piped.stage_index_to_group_rank = dict(enumerate(order))
        self._schedule = Schedule1F1B(piped, n_microbatches=len(numbers), loss_fn=llama.loss_of, scale_grads=False)

    def step(self, batch: tuple[Tensor, Tensor] | None) -> dict[int, Tensor]:
        """The losses by microbatch, on the last rank of the order."""
        found: list[Tensor] = []
        inputs, targets = (None, None) if batch is None else (self._chosen(one) for one in batch)
        given = (inputs,) if self.first else ()
        self._schedule.step(*given, target=targets if self.last else None, losses=found, return_outputs=False)
        return dict(zip(self.numbers, found, strict=False))

    def _chosen(self, rows: Tensor) -> Tensor:
        cut = rows.chunk(demo.MICROBATCHES)
        return torch.cat([cut[number] for number in self.numbers])


def plain(rank: int, world: int, steps: int) -> tuple[list[float], float]:
    """One rank of the plain script. What `Turn` says."""
    torch.set_num_threads(1)
    corpus, part = demo.Corpus(CONFIG.context), demo.Part(CONFIG, stage=rank, stages=world, copies=2)
    trained = demo.stage_of(part, HIDDEN)
    scheduler: Any = trained.scheduler
    ends = [dist.new_group([0, 1]), dist.new_group([world - 2, world - 1])]
    orders = list(range(world)), [1, 0, *range(2, world - 2), world - 1, world - 2]
    ways = [Way(part, order, list(range(odd, demo.MICROBATCHES, 2))) for odd, order in enumerate(orders)]
    sees_batches = any(way.first or way.last for way in ways)
    seconds, before, losses = list[float](), time.monotonic(), dict[int, Tensor]()
    for step in range(steps):
        batch, losses = corpus.batch(step) if sees_batches else None, {}
        for way in ways:
            losses |= way.step(batch)
        for one, group in ((part.body, None), (part.embed, ends[0]), (part.head, ends[1])):
            if one is not None:
                for each in one.parameters():
                    assert each.grad is not None
                    if group is not None:
                        dist.all_reduce(each.grad, group=group)
                    each.grad /= demo.MICROBATCHES
                nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        trained.optimizer.step()
        scheduler.step()
        trained.optimizer.zero_grad()
        seconds.append(time.monotonic() - before)
        before += seconds[-1]
    told = torch.zeros(demo.MICROBATCHES, dtype=torch.float64)
    for number, loss in losses.items():
        told[number] = loss.item()
    dist.all_reduce(told)
    return seconds[WARM:], sum(told.tolist()) / demo.MICROBATCHES


def member(steps: int, folder: Path) -> None:
    """The demo's script, and when each report came, on stage 0."""
    torch.set_num_threads(1)

    def build(place: ek.elastic.Place) -> ek.elastic.Stage:
        found: ek.elastic.Stage = demo.stage_of(demo.Part(CONFIG, stage=place.stage, stages=place.stages, copies=2), HIDDEN)
        return found

    with ek.elastic.join() as job:
        trainer = ek.elastic.PipelineTrainer(
            job, build, loader=demo.Corpus(CONFIG.context), microbatches=demo.MICROBATCHES, swap="microbatch", clip=1.0
        )
        seconds, before, loss = [], time.monotonic(), float("nan")
        for report in trainer.steps(steps):
            seconds.append(time.monotonic() - before)
            before, loss = before + seconds[-1], report.loss
        if job.rank == 0:
            (folder / "turn.json").write_text(json.dumps([seconds[WARM:], loss]))


def of_the_trainer(steps: int) -> Turn:
    with tempfile.TemporaryDirectory() as top:
        worker = (__file__, "member", str(steps), top)
        command = (sys.executable, "-c", LAUNCH, "--stages", str(STAGES), *worker)
        paths = os.pathsep.join((str(machine.REPOSITORY), str(EXAMPLE.parent)))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        return Turn(*json.loads((Path(top) / "turn.json").read_text()))


def of_the_plain_script(steps: int) -> Turn:
    from tools import step_cost  # ranks import it by its name

    found = run_ranks(step_cost.plain, STAGES, steps, timeout_s=600.0)
    return Turn(*found[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help=f"of a turn, the first {WARM} of which do not count")
    parser.add_argument("--turns", type=int, default=5)
    told = parser.parse_args()
    pairs = []
    for _ in range(told.turns):
        ours, theirs = of_the_trainer(told.steps), of_the_plain_script(told.steps)
        pairs.append((ours, theirs))
        print(
            f"trainer {ours.median_ms:.1f} ms, plain {theirs.median_ms:.1f} ms; losses {ours.loss!r}, {theirs.loss!r}",
            flush=True,
        )
    medians = [statistics.median(turn.median_ms for turn in turns) for turns in zip(*pairs, strict=True)]
    print(f"a step of the trainer over that of the plain script: {medians[0] / medians[1]:.3f} ", end="")
    print(f"({medians[0]:.1f} and {medians[1]:.1f} ms, load {os.getloadavg()[0]:.1f})")
    return 0 if all(ours.loss == theirs.loss for ours, theirs in pairs) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["member"]:
        member(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
