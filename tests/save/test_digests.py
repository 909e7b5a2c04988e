"""Digests of tensors: host memory by address or by strides, and what a device computes of its own bytes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128

from elastickpt.saving.drift import Digests, host_digest
from elastickpt.training import device as module
from elastickpt.training.device import device_digest, on_the_way


def test_a_host_digest_is_xxh3_of_the_bytes_in_c_order() -> None:
    tensor = torch.arange(24, dtype=torch.int16).reshape(4, 6)
    whole = xxh3_128(tensor.numpy().tobytes()).digest()
    assert host_digest(tensor, 0, 24) == host_digest(tensor.T.contiguous().T, 0, 24) == whole
    assert host_digest(tensor[:, 1:4], 1, 7) == xxh3_128(tensor.numpy()[:, 1:4].ravel()[1:7].tobytes()).digest()
    assert host_digest(tensor, 3, 3) == xxh3_128(b"").digest()


def test_ranges_keep_their_order() -> None:
    tensors = [torch.full((5,), float(n)) for n in range(3)]
    found = Digests()
    for tensor in tensors:
        found.add(tensor, 1, 4)
    assert found.found() == tuple(host_digest(tensor, 1, 4) for tensor in tensors) == found.found()


def stirred(words: list[int]) -> list[int]:
    """The same sums, by Python's integers."""
    wide = 1 << 64
    sums = []
    for seed in (0x9E3779B97F4A7C15, 0x4CF5AD432745937F):
        total = 0
        for place, word in enumerate(words, 1):
            one = (word + place * seed) % wide
            one = (one ^ (one >> 30)) * 0xBF58476D1CE4E5B9 % wide
            one = (one ^ (one >> 27)) * 0x94D049BB133111EB % wide
            total += one ^ (one >> 31)
        sums.append(total % wide)
    return sums


@given(st.binary(max_size=70), st.integers(0, 9))
def test_a_device_sums_what_integers_sum_whatever_the_alignment(data: bytes, before: int) -> None:
    padded = data + bytes(-len(data) % 8)
    octets = torch.from_numpy(np.frombuffer(b"\7" * before + data, dtype=np.uint8).copy())[before:]
    found = [one % (1 << 64) for one in device_digest(octets).tolist()]
    assert found == stirred(np.frombuffer(padded, dtype="<u8").tolist())


def test_a_device_goes_on_where_a_chunk_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(1000, dtype=torch.float32)
    whole = device_digest(tensor).tolist()
    monkeypatch.setattr(module, "CHUNK_WORDS", 7)
    assert device_digest(tensor).tolist() == whole


def test_a_device_sees_each_bit_and_its_place() -> None:
    """Among them two signs that change at once, which sums of products would miss."""
    before = torch.arange(64, dtype=torch.float32)
    ways = {"swapped": before.clone(), "two signs": before.clone(), "bfloat16": before.bfloat16()}
    ways["swapped"][[0, 2]] = ways["swapped"][[2, 0]]
    ways["two signs"][[1, 3]] *= -1
    for bit in range(64):
        ways[f"bit {bit}"] = before.clone()
        ways[f"bit {bit}"].view(torch.int64)[5] ^= 1 << bit if bit < 63 else -(1 << 63)
    sums = [tuple(device_digest(tensor).tolist()) for tensor in (before, *ways.values())]
    assert len(set(sums)) == len(sums)
    assert all(one[k] != other[k] for other, one in pairwise(sums) for k in (0, 1))


def test_what_a_device_found_comes_in_the_order_in_which_it_was_asked() -> None:
    tensors = [torch.full((n,), float(n)) for n in (3, 1, 2)]
    assert on_the_way([device_digest(tensor) for tensor in tensors])() == [device_digest(one).tolist() for one in tensors]
