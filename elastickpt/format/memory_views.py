"""Memory by its address, as arrays of numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Memory:
    """Elements at an address, as numpy takes them: `np.asarray` of it is a writable view, which keeps it and so its `owner`.

    A ctypes array there would be a type of its own for each length, which takes 8 µs to make, and over 40 with giving it up.
    """

    __slots__ = ("__array_interface__", "owner")

    def __init__(
        self, address: int, shape: tuple[int, ...], element: str, strides: tuple[int, ...] | None = None, *, owner: object
    ) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": element,
            "strides": strides,
            "version": 3,
        }
        self.owner = owner


def bytes_at(address: int, nbytes: int, owner: object) -> NDArray[np.uint8]:
    """shape=[nbytes]: a writable view of memory at an address, which `owner` keeps there."""
    found: NDArray[np.uint8] = np.asarray(Memory(address, (nbytes,), "|u1", owner=owner))
    return found


def address_of(view: memoryview) -> int:
    """The address of the view's first byte; 0 for an empty view."""
    if not view.nbytes:
        return 0
    address: int = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
    return address
