"""Which tensors of `state` are one object: ties between names, and an optimizer's way from parameter to name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from elastickpt.training.dtensors import Holders
from elastickpt.training.held import HeldArray, Role


@dataclass(frozen=True, slots=True, eq=False)
class KnownTensor:
    """A tensor of `state` under the first name at which it was met.

    `held` is what this rank holds of it: nothing on a rank outside its mesh, several arrays for a composite tensor.
    `holders` is for what belongs to it: a plain optimizer state of this parameter is held by the same ranks.
    """

    item: str
    name: str
    tensor: torch.Tensor
    role: Role
    held: tuple[HeldArray, ...]
    holders: Holders


class Identities:
    """Tensors of `state` by identity, in the order in which they were met; kept alive, so that no id is used again."""

    def __init__(self) -> None:
        self._known: dict[int, KnownTensor] = {}
        self._aliases: dict[int, list[tuple[str, str]]] = {}

    def find(self, tensor: torch.Tensor) -> KnownTensor | None:
        """The first name of this tensor object, None if it was not met."""
        return self._known.get(id(tensor))

    def add(self, known: KnownTensor) -> None:
        """Records a tensor that was not met before."""
        self._known[id(known.tensor)] = known
        self._aliases[id(known.tensor)] = [(known.item, known.name)]

    def alias(self, tensor: torch.Tensor, item: str, name: str) -> None:
        """Records one more name of a tensor that was met before; the same name again changes nothing."""
        names = self._aliases[id(tensor)]
        if (item, name) not in names:
            names.append((item, name))

    def tied(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        """Groups of (item, name) that are one tensor; only the first of each group is stored."""
        return tuple(tuple(names) for names in self._aliases.values() if len(names) > 1)

    def __iter__(self) -> Iterator[KnownTensor]:
        return iter(self._known.values())
