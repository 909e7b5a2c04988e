"""A model of a few hundred parameters in pipeline stages, and the same steps by one process, without a pipeline.

Its bodies draw random numbers (dropout) and count what passes them in a buffer, so that streams and buffers can go wrong.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from elastickpt.elastic.checkfree import partner
from elastickpt.elastic.passage import Passing, flushes_of, parts_at
from elastickpt.elastic.stages import Place, Stage
from elastickpt.elastic.starts import seed_streams

WIDTH, VOCAB, ROWS, SEED = 8, 11, 24, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.25)
        self.passed: Tensor
        self.register_buffer("passed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passed += 1
            self.seen = self.seen * 0.5 + x.detach().mean(0)  # another tensor than before
        hidden: Tensor = x + self.dropout(torch.tanh(self.linear(self.norm(x))))
        return hidden


class Model(nn.Module):
    """Layers keep their numbers in the whole model. `copies`: of embedding and head, for a swapped order."""

    def __init__(self, place: Place, *, copies: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        embed, head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        blocks = [Block() for _ in range(layers)]
        mine = range(layers * place.stage // place.stages, layers * (place.stage + 1) // place.stages)
        self.layers = nn.ModuleDict({str(number): blocks[number] for number in mine})
        self.embed = embed if place.stage < copies else None
        self.head = head if place.stage >= place.stages - copies else None


def build(place: Place, passing: Passing, *, layers: int | None = None) -> Stage:
    model = Model(place, copies=1 if passing.swap is None else 2, layers=layers or 2 * place.stages)
    hidden = torch.empty(ROWS // passing.microbatches, WIDTH, device="meta")
    made = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Stage(
        model,
        made,
        body=nn.Sequential(*model.layers.values()),
        embed=model.embed,
        head=model.head,
        scheduler=torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + 0.1 * step)),
        loss=nn.functional.cross_entropy,
        example=(hidden, hidden),
    )


class Corpus:
    """Batches by completed steps."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(VOCAB, (ROWS + 1,), generator=generator)
        return tokens[:-1], tokens[1:]


class Sequential:
    """All stages in one process: every microbatch through all of them, forward and backward, then the next one."""

    def __init__(self, stages: int, passing: Passing, *, layers: int | None = None) -> None:
        self.passing, self.places = passing, [Place(stage, stages) for stage in range(stages)]
        self.stages = [build(place, passing, layers=layers) for place in self.places]
        self.streams: list[tuple[object, Tensor]] = []

    def gradients(self, step: int, batch: tuple[Tensor, Tensor]) -> list[float]:
        """The losses by microbatch; gradients are sums over the microbatches of each stage."""
        count, losses = self.passing.microbatches, {}
        self.streams = []
        for place in self.places:
            seed_streams(SEED, step, place.stage)
            self.streams.append((random.getstate(), torch.get_rng_state()))
        for flush in flushes_of(self.passing, step=step, stages=len(self.stages)):
            for number in flush.microbatches:
                hidden, target = (one.chunk(count)[number] for one in batch)
                for position, stage in enumerate(flush.order):
                    hidden = self._through(stage, position, hidden)
                loss = nn.functional.cross_entropy(hidden, target)
                loss.backward()
                losses[number] = loss.item()
        return [losses[number] for number in range(count)]

    def _through(self, stage: int, position: int, hidden: Tensor) -> Tensor:
        torch.set_rng_state(self.streams[stage][1])
        for part in parts_at(self.stages[stage], position, len(self.stages)):
            hidden = part(hidden)
        self.streams[stage] = (None, torch.get_rng_state())
        return hidden

    def sum_replicas(self) -> None:
        for one, other in ((0, 1), (len(self.stages) - 2, len(self.stages) - 1)):
            if self.passing.swap is None or partner(one, len(self.stages)) != other:
                continue
            for part in ("embed", "head"):
                for a, b in zip(self.stages[one].parameters(part), self.stages[other].parameters(part), strict=True):
                    given = [p.grad for p in (a, b) if p.grad is not None]
                    total = given[0] if len(given) == 1 else given[0] + given[1]
                    a.grad, b.grad = total.clone(), total.clone()

    def whole(self) -> list[nn.Parameter]:
        """Every parameter of the whole model once: embedding, layers, head."""
        bodies = [one for stage in self.stages for one in stage.parameters("body")]
        return [*self.stages[0].parameters("embed"), *bodies, *self.stages[-1].parameters("head")]
