"""Something like training, to be slowed down: steps of work on every rank, each of which ends with all ranks agreeing."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
import torch.distributed as dist

from .records import Finish

WIDTH = 512
PRODUCTS = 4
USUAL_STEPS = 15


class Training:
    """Steps of some 20 ms on one thread: products of matrices, a pass over memory, and a reduction over all ranks."""

    def __init__(self) -> None:
        self._left, self._right = torch.ones(WIDTH, WIDTH), torch.full((WIDTH, WIDTH), 1e-6)
        self._moments = torch.zeros(2 << 20)

    def step(self, *, done: bool) -> bool:
        """Whether all ranks said that they are done. Blocking."""
        for _ in range(PRODUCTS):
            torch.mm(self._left, self._right)
        self._moments.mul_(0.9).add_(0.1)
        agreed = torch.tensor([int(done)])
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed.item())

    def usual_s(self) -> float:
        """What a step takes while nothing is saved, in seconds: the median of a few."""
        taken = []
        for _ in range(USUAL_STEPS):
            begun = time.perf_counter()
            self.step(done=False)
            taken.append(time.perf_counter() - begun)
        return median(taken)

    def slowed_s(self, finish: Finish, *, begun: float, usual_s: float) -> float:
        """Steps until `finish` returns on all ranks; the time since `begun` less what the steps usually take, in seconds.

        Raises what `finish` raises.
        """
        steps = 1
        with ThreadPoolExecutor(1) as waiting:
            saved = waiting.submit(finish)
            while not self.step(done=saved.done()):
                steps += 1
            ended = time.perf_counter()
            saved.result()
        return ended - begun - steps * usual_s
