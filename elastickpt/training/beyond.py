"""What of a state dict is memory that a checkpoint has already, and what is beyond: told by memory, since wrappers and hooks
rename.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

import torch

from elastickpt.training.composites import leaves_of
from elastickpt.training.dtensors import placed
from elastickpt.training.elements import settled


class Known:
    """The memory of tensors that are carried already."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        kept = tuple(tensors)  # alive, so that no memory is used again meanwhile
        self._kept = kept
        self._ids = {id(tensor) for tensor in kept}
        self._memory = {memory for tensor in kept if (memory := memory_of(tensor)) is not None}

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether these are elements of a known tensor, in whatever shape."""
        return id(tensor) in self._ids or memory_of(tensor) in self._memory


def memory_of(tensor: torch.Tensor) -> Hashable | None:
    """Equal for two tensors over the same elements; None for one without memory (empty, meta, sparse)."""
    parts = placed(settled(tensor))
    local = tensor if parts is None else parts.local
    found = []
    for _, inner in leaves_of(local):
        if inner.layout is not torch.strided or inner.is_meta or inner.numel() == 0:
            return None
        found.append((inner.device, inner.data_ptr(), inner.numel(), inner.dtype))
    return tuple(found)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)
