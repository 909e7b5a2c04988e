"""How members of one view send each other tensors."""

from __future__ import annotations

from typing import Protocol

import torch


class LinkBroken(Exception):
    """What was sent or waited for did not come about: a member is gone, or this group was ended."""


class Sending(Protocol):
    def wait(self) -> None:
        """Until the tensor may change again. Raises LinkBroken."""
        ...


class Links(Protocol):
    """Between the members of one view; a member is known by its stage. Re-formation makes new ones."""

    stage: int
    stages: int

    def send(self, tensor: torch.Tensor, stage: int) -> Sending:
        """Not blocking; the tensor must not change before the wait is over."""
        ...

    def receive(self, tensor: torch.Tensor, stage: int) -> None:
        """Fills `tensor` with what was sent, in order. Blocking without a limit; raises LinkBroken."""
        ...

    def abort(self) -> None:
        """Ends what any thread waits for here, and everything that is asked for from now on. From any thread; quick."""
        ...

    def close(self) -> None:
        """Frees what the links hold. By the thread that uses them."""
        ...


def told_by_all(links: Links, mine: torch.Tensor) -> list[torch.Tensor]:
    """What every member says, by stage: tensors of one shape and type. Blocking; raises LinkBroken."""
    others = [stage for stage in range(links.stages) if stage != links.stage]
    sendings = [links.send(mine, stage) for stage in others]
    told = [mine if stage == links.stage else torch.empty_like(mine) for stage in range(links.stages)]
    for stage in others:
        links.receive(told[stage], stage)
    for sending in sendings:
        sending.wait()
    return told


def told_by_one(links: Links, tensor: torch.Tensor, stage: int) -> torch.Tensor:
    """What the member of `stage` says in `tensor`, which elsewhere is filled. Blocking; raises LinkBroken."""
    if links.stage == stage:
        for sending in [links.send(tensor, other) for other in range(links.stages) if other != stage]:
            sending.wait()
    else:
        links.receive(tensor, stage)
    return tensor
