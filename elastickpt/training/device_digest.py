"""A digest that a device computes of its own bytes, beside whatever else it does.

Two sums, modulo 2^64, over the bytes as words of 8, each stirred with its place by the finalizer of SplitMix64
(Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014). It finds what changed by accident; it is no
proof against intent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

CHUNK_WORDS = 1 << 22  # 32 MiB are stirred at a time: a few times that is what it takes of the device's memory
_SEEDS = (-0x61C8864680B583EB, 0x4CF5AD432745937F)  # odd, one for each sum
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


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


def on_the_way(digests: Sequence[torch.Tensor]) -> Callable[[], list[list[int]]]:
    """What waits for these, whose copies in host memory are under way. Not blocking."""
    together = torch.stack([one.to(digests[0].device) for one in digests])
    if together.device.type != "cuda":
        return together.tolist
    pinned = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
    pinned.copy_(together, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(together.device))

    def wait() -> list[list[int]]:
        done.synchronize()
        return pinned.tolist()

    return wait
