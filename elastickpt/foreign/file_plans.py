"""A file that is to be written: where each tensor's bytes go, and the bytes around them. Nothing is written here. [FOR-90..93]

Every size and place is known before the first byte, so that several workers can fill one file, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

from elastickpt.format.arrays import dtype_named

ByteFrame: TypeAlias = tuple[int, bytes]  # offset in the file, what stands there
FileChecksums: TypeAlias = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that a file shall hold. Two with one `key` are one tensor: their bytes stand in the file once."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * dtype_named(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where the elements of a tensor go, in C order, one after the other."""

    tensor: NewTensor
    offset: int

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file of `nbytes` bytes. Slots and frames together are all of it but for bytes of padding, which are zero.

    `frames` takes the CRC-32 of each slot's bytes by the tensor's key; a zip archive states those that it is given, and 0
    for the others, as torch does that was told to make none.
    """

    path: str
    nbytes: int
    slots: tuple[TensorSlot, ...]
    framing: Callable[[FileChecksums], Iterable[ByteFrame]] = field(repr=False)

    def frames(self, checksums: FileChecksums) -> Iterable[ByteFrame]:
        return self.framing(checksums)


def constant_file(path: str, data: bytes) -> FilePlan:
    """A file without tensors."""
    return FilePlan(path, len(data), (), lambda _: ((0, data),))


def combined_crc32(first: int, second: int, second_nbytes: int) -> int:
    """The CRC-32 of two byte strings laid end to end, from theirs: pieces of a tensor may be written in any order.

    A CRC is linear over GF(2): `first` is carried over `second_nbytes` zero bytes by squaring the matrix of one zero bit.
    Source: zlib's documentation of crc32_combine.
    """
    operator = [0xEDB88320, *(1 << bit for bit in range(31))]  # one zero bit
    for _ in range(2):
        operator = _squared(operator)  # four bits
    while second_nbytes:
        operator = _squared(operator)  # one byte, two bytes, four, ...
        if second_nbytes & 1:
            first = _applied(operator, first)
        second_nbytes >>= 1
    return first ^ second


def _applied(operator: list[int], value: int) -> int:
    total, bit = 0, 0
    while value:
        if value & 1:
            total ^= operator[bit]
        value >>= 1
        bit += 1
    return total


def _squared(operator: list[int]) -> list[int]:
    return [_applied(operator, column) for column in operator]
