"""Train a small language model in pipeline stages, one process each; kill any of them, and training goes on.

    elastickpt-run --stages 6 --spares 1 examples/lose_a_stage.py --root out/spot
    kill -9 <pid of a worker>          # pids are printed; a spare takes the place, and the stage is rebuilt

Started again, with fewer stages too, it goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
from pathlib import Path

import torch
from llama import Block, Config, loss_of
from torch import Tensor, nn

import elastickpt as ek

SEQUENCES, MICROBATCHES, HELD_OUT = 24, 12, 4  # of a step; of an evaluation, in batches
LR = 3e-3


class Corpus:
    """The sources of the running Python's standard library; a batch depends on nothing but the step."""

    def __init__(self, context: int, limit_nbytes: int = 4 << 20) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)[:limit_nbytes]
        self.text, self.context = torch.frombuffer(bytearray(text), dtype=torch.uint8), context

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the step after `step` completed ones, each [SEQUENCES, context]."""
        starts = torch.randint(len(self.text) - self.context, (SEQUENCES, 1), generator=torch.Generator().manual_seed(step))
        rows = self.text[starts + torch.arange(self.context + 1)].long()
        return rows[:, :-1], rows[:, 1:]

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """Batches that no step sees."""
        return [self.batch(10_000_000 + number) for number in range(HELD_OUT)]


class Blocks(nn.Module):
    """The layers of one stage; a layer keeps its number in the whole model."""

    def __init__(self, config: Config, numbers: range) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for number in numbers:
            torch.manual_seed(number)  # the same initial values at any number of stages
            self.layers[str(number)] = Block(config)
        half = config.dim // config.heads // 2
        angles = torch.arange(config.context)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("rope", torch.stack((angles.cos(), angles.sin())), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers.values():
            hidden = layer(hidden, self.rope)
        return hidden


class Part(nn.Module):
    """One stage of the model. With `copies=2`, the two stages of each end have the embedding, and the head, both."""

    def __init__(self, config: Config, *, stage: int, stages: int, copies: int) -> None:
        super().__init__()
        first, last = stage * config.layers // stages, (stage + 1) * config.layers // stages
        self.body = Blocks(config, range(first, last))
        torch.manual_seed(1_000_000)
        self.embed = nn.Embedding(config.vocab, config.dim) if stage < copies else None
        torch.manual_seed(2_000_000)
        head = nn.Sequential(nn.RMSNorm(config.dim), nn.Linear(config.dim, config.vocab, bias=False))
        self.head = head if stage >= stages - copies else None


def stage_of(part: Part, hidden: Tensor) -> ek.elastic.Stage:
    """A part with what trains it; `hidden` is what a microbatch is between two stages, on meta."""
    optimizer = torch.optim.AdamW(part.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    return ek.elastic.Stage(
        part,
        optimizer,
        body=part.body,
        embed=part.embed,
        head=part.head,
        scheduler=scheduler,
        loss=loss_of,
        example=(hidden, hidden),
    )


def main() -> None:
    options = read_options()
    torch.set_num_threads(1)
    config = Config(dim=options.dim, layers=options.layers, heads=4, kv_heads=2, hidden=3 * options.dim, context=64)
    corpus, swap = Corpus(config.context), options.swap or None
    hidden = torch.empty(SEQUENCES // MICROBATCHES, config.context, config.dim, device="meta")

    def build(place: ek.elastic.Place) -> ek.elastic.Stage:
        return stage_of(Part(config, stage=place.stage, stages=place.stages, copies=2 if swap else 1), hidden)

    run = ek.Run(options.root, options=ek.RunOptions(due=ek.Every(steps=options.save_every))) if options.root else None
    with ek.elastic.join() as job:
        print(f"process {os.getpid()}: {'a spare' if job.rank is None else f'stage {job.rank}'}", flush=True)
        trainer = ek.elastic.PipelineTrainer(
            job,
            build,
            loader=corpus,
            microbatches=MICROBATCHES,
            swap=swap,
            clip=1.0,
            run=run,
            policy=ek.elastic.Policy(rungs=tuple(options.rungs.split(","))),
        )
        for report in trainer.steps(options.steps):
            if job.rank == 0:
                rungs = [one.rung for one in report.recovered]
                print(json.dumps({"step": report.step, "loss": report.loss, "rebuilt by": rungs}), flush=True)
        loss = trainer.evaluate(corpus.held_out())
        if job.rank == 0:
            print(json.dumps({"held out": loss}), flush=True)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="", help="the run, from whose newest checkpoint it goes on; none: nothing is saved")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--swap", default="microbatch", help="microbatch, step, or '' for none")
    parser.add_argument("--rungs", default="stale,partner,checkfree,rollback", help="from what a lost stage may be rebuilt")
    return parser.parse_args()


if __name__ == "__main__":
    main()
