"""What a step starts from besides parameters: its batch, its random streams, the buffers that forward changes.

All of it can be had again, so that a step that is aborted is replayed with the same numbers, by whoever holds the place then.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeGuard

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from elastickpt.errors import Refused

Batch = tuple[Tensor, Tensor]


class Loader(Protocol):
    def batch(self, step: int) -> Batch:
        """Inputs and targets of the whole batch after `step` completed steps; the same on every place that asks."""
        ...


class BatchChanged(Exception):
    """A batch has another form than the first one had, or members evaluate different batches, as the message says. It would be
    so again in a replay."""


class Batches:
    """A loader's batches, each looked at before it is used."""

    def __init__(self, loader: object, microbatches: int) -> None:
        """Raises Refused for a loader without `batch`."""
        batch = getattr(loader, "batch", None)
        if not callable(batch):
            raise Refused(f"loader: a {type(loader).__name__} without batch(step), which gives inputs and targets")
        self._batch: Callable[[int], object] = batch
        self._microbatches = microbatches
        self._form = ""

    @property
    def seen(self) -> bool:
        """Whether one was looked at."""
        return bool(self._form)

    def of(self, step: int) -> Batch:
        """The batch after `step` completed steps.

        Raises Refused for a first one that is not two tensors, or whose rows the microbatches do not divide; BatchChanged for
        shapes or types other than the first one's; and what the loader raises.
        """
        what = f"batch({step})"
        batch = self._batch(step)
        form = _form_of(batch)
        if self._form and form != self._form:
            raise BatchChanged(f"{what} is {form}, expected {self._form} as the first batch was")
        batch = require_batch(batch, self._microbatches, what=what)
        self._form = form
        return batch


def _form_of(batch: object) -> str:
    """In words: types and shapes of two tensors, or what it is instead."""
    if not _is_two(batch):
        return f"a {type(batch).__name__}"
    return " and ".join(f"{str(one.dtype).removeprefix('torch.')} {tuple(one.shape)}" for one in batch)


def _is_two(found: object) -> TypeGuard[Batch]:
    return isinstance(found, Sequence) and len(found) == 2 and all(isinstance(one, Tensor) for one in found)


def require_batch(found: object, microbatches: int, *, what: str) -> Batch:
    """Two tensors whose rows the microbatches divide. Raises Refused."""
    if not _is_two(found):
        raise Refused(f"{what}: a {type(found).__name__}, expected two tensors, inputs and targets")
    inputs, targets = found
    for name, one in (("inputs", inputs), ("targets", targets)):
        if one.dim() == 0 or one.shape[0] == 0 or one.shape[0] % microbatches:
            rows = one.shape[0] if one.dim() else 0
            raise Refused(f"{what}: {name} of {rows} rows, expected a multiple of microbatches={microbatches}")
    return inputs, targets


def digest_of(batch: Batch) -> str:
    """The same for the same bytes, shapes and types."""
    digest = xxhash.xxh3_128()
    for one in batch:
        digest.update(f"{one.dtype} {tuple(one.shape)};".encode())
        digest.update(one.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


def seed_streams(seed: int, step: int, stage: int) -> None:
    """Seeds Python's, numpy's and torch's streams of this process from (seed, completed steps, stage)."""
    number = int.from_bytes(hashlib.sha256(f"elastickpt {seed} {step} {stage}".encode()).digest()[:8], "little")
    random.seed(number)
    np.random.seed(number & 0xFFFF_FFFF)
    torch.manual_seed(number)


class KeptBuffers:
    """The buffers of a module as they are now, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self._kept: dict[str, tuple[nn.Module, str, Tensor, Tensor]] = {
            f"{path}.{name}" if path else name: (owner, name, buffer, buffer.detach().clone())
            for path, owner in module.named_modules()
            for name, buffer in owner.named_buffers(recurse=False)
        }

    def content(self, name: str) -> Tensor:
        """What the buffer of this name in the module had then."""
        return self._kept[name][3]

    def put_back(self) -> None:
        """Their contents, and the tensors themselves where forward has put others in their place."""
        for name in self._kept:
            self.put(name, self.content(name))

    def put(self, name: str, content: Tensor) -> None:
        """One of them has this content, whatever forward has put in its place."""
        owner, attribute, buffer, _ = self._kept[name]
        with torch.no_grad():
            buffer.copy_(content)
        setattr(owner, attribute, buffer)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """In here the module is in evaluation mode; afterwards modes, buffers and random streams are what they were."""
    modes = [(one, one.training) for one in module.modules()]
    kept, python, numpy_state = KeptBuffers(module), random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        module.eval()
        try:
            yield
        finally:
            for one, training in modes:
                one.training = training
            kept.put_back()
            random.setstate(python)
            np.random.set_state(numpy_state)
