"""Memory by its address, as arrays of numpy and as plain views."""

from __future__ import annotations

import ctypes

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


_PYTHON = ctypes.PyDLL(None)  # whose calls keep the interpreter's lock
_view_of = _PYTHON.PyMemoryView_FromMemory  # of the C API
_view_of.argtypes, _view_of.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_WRITABLE = 0x200  # PyBUF_WRITE


def view_at(address: int, nbytes: int) -> memoryview:
    """shape=[nbytes]: the same as a view that does not keep the memory: its caller does, as long as anyone has it. It takes
    less than half of the time."""
    found: memoryview = _view_of(address, nbytes, _WRITABLE)
    return found


def address_of(view: memoryview) -> int:
    """The address of the view's first byte; 0 for an empty view."""
    if not view.nbytes:
        return 0
    if not view.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))  # a fifth of the time that numpy takes
    address: int = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
    return address
