"""Digests of what tensors hold: of host memory at once, of a device beside what it computes.

    digests = Digests()
    digests.add(tensor, first, last)   # for each; reads host memory, gives the device its work
    digests.found()                    # waits for the device: one digest for each, in their order

A host's digest is xxh3-128. A device computes its own, so that nothing but the digest leaves it: two sums, modulo 2^64, over
its bytes as words of 8, each stirred with its place (the finalizer of SplitMix64, Steele et al., OOPSLA 2014). Equal contents
have equal digests of one kind; the two kinds never agree.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from xxhash import xxh3_128

from elastickpt.save.gather import range_digest
from elastickpt.training.memory import host_address, host_elements

CHUNK_WORDS = 1 << 22  # 32 MiB are stirred at a time: a few times that is what it takes of the device's memory
_SEEDS = (-0x61C8864680B583EB, 0x4CF5AD432745937F)  # odd, one for each sum
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


class Digests:
    """Digests of ranges of tensors, in the order in which they were added."""

    def __init__(self) -> None:
        self._found: list[bytes | int] = []  # or the number of a device's one
        self._on_device: list[torch.Tensor] = []
        self._copied: Callable[[], torch.Tensor] | None = None

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
            first = self._on_device[0].device
            self._copied = _on_the_way(torch.stack([one.to(first) for one in self._on_device]))
            self._on_device = []

    def found(self) -> tuple[bytes, ...]:
        """One for each range. Blocking until the device has them."""
        self.close()
        rows = [] if self._copied is None else self._copied().tolist()
        return tuple(_device_bytes(rows[one]) if isinstance(one, int) else one for one in self._found)


def host_digest(tensor: torch.Tensor, first: int, last: int) -> bytes:
    """Of a tensor in host memory: xxh3-128 of its elements [first, last) in C order, whatever the strides."""
    address, itemsize = host_address(tensor), tensor.element_size()
    if address is None or first == last:
        return range_digest(host_elements(tensor), first, last)
    return xxh3_128((ctypes.c_char * ((last - first) * itemsize)).from_address(address + first * itemsize)).digest()


def device_digest(flat: torch.Tensor) -> torch.Tensor:
    """shape=[2], int64, on the device of `flat`, which is one-dimensional: two sums that depend on each byte and its place.

    Sums of integers are the same in whatever order a device adds. Not blocking.
    """
    octets = flat.view(torch.uint8)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    whole = octets.numel() // 8
    for start in range(0, whole, CHUNK_WORDS):
        chunk = octets[start * 8 : min(start + CHUNK_WORDS, whole) * 8]
        aligned = chunk if chunk.storage_offset() % 8 == 0 else chunk.clone()
        total += _sums(aligned.view(torch.int64), start)
    if octets.numel() > whole * 8:
        last = torch.zeros(8, dtype=torch.uint8, device=flat.device)
        last[: octets.numel() - whole * 8] = octets[whole * 8 :]
        total += _sums(last.view(torch.int64), whole)
    return total


def _sums(words: torch.Tensor, start: int) -> torch.Tensor:
    """shape=[2]: over these words, the first of which stands at place `start`."""
    places = torch.arange(start + 1, start + 1 + words.numel(), dtype=torch.int64, device=words.device)
    return torch.stack([_stirred(words + places * seed).sum() for seed in _SEEDS])


def _stirred(words: torch.Tensor) -> torch.Tensor:
    """A bijection of words in which each bit changes about half of all. A shift repeats the sign, which is cut off again."""
    words = (words ^ ((words >> 30) & 0x3FFFFFFFF)) * _FIRST
    words = (words ^ ((words >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return words ^ ((words >> 31) & 0x1FFFFFFFF)


def _on_the_way(digests: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Waits for their copy in host memory, which is under way."""
    if digests.device.type != "cuda":
        host = digests.to("cpu")
        return lambda: host
    pinned = torch.empty(digests.shape, dtype=digests.dtype, pin_memory=True)
    pinned.copy_(digests, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(digests.device))

    def wait() -> torch.Tensor:
        done.synchronize()
        return pinned

    return wait


def _device_bytes(sums: list[int]) -> bytes:
    """Longer than a host's, so that the two kinds differ."""
    return b"device " + b"".join(one.to_bytes(8, "little", signed=True) for one in sums)
