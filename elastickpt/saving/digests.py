"""Digests of what tensors hold: of host memory at once, of a device beside what it computes.

    digests = Digests()
    digests.add(tensor, first, last)   # for each; reads host memory, gives the device its work
    digests.found()                    # waits for the device: one digest for each, in their order

A host's digest is xxh3-128; a device computes one of its own (`training.device_digest`), so that nothing but the digest leaves
it. Equal contents have equal digests of one kind; the two kinds never agree.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xxhash import xxh3_128

from elastickpt.saving.gather import range_digest
from elastickpt.training.device_digest import device_digest, on_the_way
from elastickpt.training.memory import host_address, host_elements

if TYPE_CHECKING:
    import torch


class Digests:
    """Digests of ranges of tensors, in the order in which they were added."""

    def __init__(self) -> None:
        self._found: list[bytes | int] = []  # or the number of a device's one
        self._on_device: list[torch.Tensor] = []
        self._copied: Callable[[], Sequence[Sequence[int]]] | None = None

    def add(self, tensor: torch.Tensor, first: int, last: int) -> None:
        """Elements [first, last) of a tensor in C order, whatever its strides, as they are once all work given to the current
        stream so far is done. Blocking for a pass over host memory; not for a device."""
        if tensor.device.type == "cpu":
            self._found.append(host_digest(tensor, first, last))
        else:
            self._found.append(len(self._on_device))
            self._on_device.append(device_digest(tensor.detach().reshape(-1)[first:last]))

    def close(self) -> None:
        """No more are added: the device's digests are on their way to the host. Not blocking."""
        if self._on_device:
            self._copied, self._on_device = on_the_way(self._on_device), []

    def found(self) -> tuple[bytes, ...]:
        """One for each range. Blocking until the device has them."""
        self.close()
        rows = [] if self._copied is None else self._copied()
        return tuple(_device_bytes(rows[one]) if isinstance(one, int) else one for one in self._found)


def host_digest(tensor: torch.Tensor, first: int, last: int) -> bytes:
    """Of a tensor in host memory: xxh3-128 of its elements [first, last) in C order, whatever the strides."""
    address, itemsize = host_address(tensor), tensor.element_size()
    if address is None or first == last:
        return range_digest(host_elements(tensor), first, last)
    return xxh3_128((ctypes.c_char * ((last - first) * itemsize)).from_address(address + first * itemsize)).digest()


def _device_bytes(sums: Sequence[int]) -> bytes:
    """Longer than a host's, so that the two kinds differ."""
    return b"device " + b"".join(one.to_bytes(8, "little", signed=True) for one in sums)
