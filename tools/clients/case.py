"""What one case is: a job that trains, and what of it is compared."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import elastickpt as ek

STEPS, SAVED_AT = 6, 3
KILLED = 17  # the exit code of a life that ends after its save


@dataclass(frozen=True, slots=True)
class Job:
    """`state` as `ek.save` takes it; `step(k)` trains step k; `seen()` is all that has to be the same after it."""

    state: dict[str, Any]
    step: Callable[[int], object]
    seen: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a job's process: `whole` runs all steps, `killed` saves after SAVED_AT of them and ends on the spot,
    `resumed` goes on from there in a new process."""

    kind: str
    path: str
    processes: int

    @property
    def first(self) -> int:
        """The step with which it begins."""
        return SAVED_AT if self.kind == "resumed" else 0

    def load(self, state: dict[str, Any]) -> None:
        """In a life that resumes: everything of `state`, strictly."""
        if self.kind == "resumed":
            ek.load(state, self.path)

    def stepped(self, state: dict[str, Any], number: int) -> None:
        """After each step, `number` of them are done: saves and ends the process, in the life that is killed then."""
        if self.kind == "killed" and number == SAVED_AT:
            ek.save(state, self.path, step=number)
            os._exit(KILLED)

    def through(self, job: Job) -> object:
        """The usual loop."""
        self.load(job.state)
        for number in range(self.first, STEPS):
            job.step(number)
            self.stepped(job.state, number + 1)
        return job.seen()


@dataclass(frozen=True, slots=True)
class Case:
    """`run` is the whole script of a life, and returns all that has to be the same at its end. `processes`: on how many."""

    package: str
    name: str
    run: Callable[[Life], object]
    processes: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a case: "bit for bit", "differs", "refused", "fails" or "not tried"."""

    package: str
    name: str
    processes: int
    verdict: str
    why: str = ""


def looped(make: Callable[[int], Job]) -> Callable[[Life], object]:
    """The script of a job with the usual loop; `make` builds it afresh for a number of processes."""
    return lambda life: life.through(make(life.processes))


def digest(value: object) -> str:
    """Of every bit of every tensor and number inside; entries of mappings in the order of their keys' texts."""
    hasher = hashlib.blake2b(digest_size=12)
    for part in _parts(value):
        hasher.update(part)
    return hasher.hexdigest()


def _parts(value: object) -> Iterator[bytes]:
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        yield from _tensor(value)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield repr(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple, set, frozenset)):
        for one in value:
            yield from _parts(one)
    elif hasattr(value, "__dict__") and not callable(value):
        yield type(value).__name__.encode()
        yield from _parts(vars(value))
    else:
        yield repr(value).encode()


def _tensor(tensor: torch.Tensor) -> Iterator[bytes]:
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        yield repr(context).encode()
        for name in names:
            yield from _tensor(getattr(tensor, name))
        return
    tensor = tensor.detach().cpu()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def batch(step: int, rows: int = 8, width: int = 16) -> torch.Tensor:
    """The batch of one step, the same in every life of the job."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1000 + step))


def model(width: int = 16) -> torch.nn.Module:
    """A small model whose matrices have room for blocks of low-bit optimizers."""
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(width, 64), torch.nn.Tanh(), torch.nn.Linear(64, width))


def wrapped(module: torch.nn.Module, processes: int) -> torch.nn.Module:
    """The same on several processes: under DDP."""
    return torch.nn.parallel.DistributedDataParallel(module) if processes > 1 else module


def train(module: torch.nn.Module, optimizer: Any) -> Callable[[int], object]:
    """The usual step, with a closure for who wants one."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()  # schedule-free ones ask for it
    closure_of = inspect.signature(optimizer.step).parameters.get("closure")
    wants_closure = closure_of is not None and closure_of.default is closure_of.empty

    def step(number: int) -> object:
        inputs = batch(number)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = ((module(inputs) - inputs) ** 2).mean()
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types there
            return loss

        if wants_closure:
            return optimizer.step(closure)
        closure()
        return optimizer.step()

    return step


def states_of(optimizer: Any) -> object:
    """All of an optimizer's own state, by the place of its parameter."""
    found: dict[Any, Any] = {}
    for index, group in enumerate(optimizer.param_groups):
        found[index] = [dict(optimizer.state.get(p, {})) for p in group["params"]]
        found[f"options {index}"] = {key: value for key, value in group.items() if key != "params"}
    return found
