"""Members of a job as processes of their own, which no process group joins but the one that they make."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from tools.gloo_ranks import spawn_ranks


def run_members(function: Callable[..., object], stages: int, *args: object, timeout_s: float = 300.0) -> list[Any]:
    """The results of `function(stage, stages, *args)` by stage; `function` stands at the top level of a module."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(spawn_ranks(_as_member, 1, function, s, stages, *args, timeout_s=timeout_s))
            for s in range(stages)
        ]
        outcomes = [one.wait()[0] for one in started]
    failed = sorted((one for one in outcomes if one.error is not None), key=lambda one: one.at)
    if failed:
        raise AssertionError("\n".join(f"{one.traceback}\n{one.output}" for one in failed)) from failed[0].error
    return [one.value for one in outcomes]


def _as_member(rank: int, world_size: int, function: Callable[..., object], stage: int, stages: int, *args: object) -> object:
    dist.destroy_process_group()  # of this process alone
    torch.set_num_threads(1)  # the backward of a norm sums by threads
    return function(stage, stages, *args)
