"""One rank of the model of `examples/lose_a_stage.py` under torchrun: it loads the newest checkpoint and trains from there.

    torchrun ... tools/restarted_stage.py ROOT EVERY MARKS

Tells in a file of the folder MARKS when it began its first microbatch. For `tools.kill_times`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
import torch.distributed as dist
from llama import Config, loss_of
from lose_a_stage import LR, MICROBATCHES, SEQUENCES, Corpus, Part
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import elastickpt as ek


class InTurn(nn.Module):
    """What a microbatch passes on this rank."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.parts = nn.ModuleList(one for one in (part.embed, part.body, part.head) if one is not None)

    def forward(self, hidden: Tensor) -> Tensor:
        for part in self.parts:
            hidden = part(hidden)
        return hidden


def main(root: str, every: int, marks: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = Config(dim=64, layers=12, heads=4, kv_heads=2, hidden=192, context=64)  # as the example has it
    part, corpus = Part(config, stage=rank, stages=ranks, copies=1), Corpus(config.context)
    optimizer = torch.optim.AdamW(part.parameters(), lr=LR)
    tokens = torch.empty(SEQUENCES // MICROBATCHES, config.context, dtype=torch.long, device="meta")
    hidden = torch.empty(*tokens.shape, config.dim, device="meta", requires_grad=True)
    given = tokens if rank == 0 else hidden
    made = torch.empty(*tokens.shape, config.vocab, device="meta") if rank == ranks - 1 else hidden
    stage = PipelineStage(InTurn(part), rank, ranks, torch.device("cpu"), input_args=(given,), output_args=(made,))
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=loss_of)
    run = ek.Run(root, {"model": part, "optimizer": optimizer}, options=ek.RunOptions(due=ek.Every(steps=every)))
    first = run.restore().step
    life = os.environ["TORCHELASTIC_RESTART_COUNT"]

    def begin(*_: object) -> None:
        begins.remove()
        (marks / f"began-{life}-{rank}").write_text(f"{os.getpid()} {time.time()}")

    begins = part.body.register_forward_pre_hook(begin)
    for step in range(first, 10**6):
        inputs, targets = corpus.batch(step)
        schedule.step(*([inputs] if rank == 0 else []), target=targets if rank == ranks - 1 else None)
        optimizer.step()
        optimizer.zero_grad()
        if run.due(step + 1):
            run.save(step + 1)
        if rank == 0:
            print(json.dumps({"step": step + 1}), flush=True)
    run.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
