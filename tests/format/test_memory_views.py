"""Memory by its address: the same bytes, whichever way it is looked at."""

from __future__ import annotations

import numpy as np
import pytest

from elastickpt.format.memory_views import address_of, bytes_at, view_at

TYPES = ["u1", "<u2", "<f8", "<c16"]


@pytest.mark.parametrize("element", TYPES)
@pytest.mark.parametrize("first", [0, 1, 3])
def test_the_address_of_a_view_is_where_its_elements_lie(element: str, first: int) -> None:
    whole = np.arange(4 * 6).astype(element).reshape(4, 6)
    part = whole[first:]
    for view in (part.data, memoryview(part).toreadonly()):
        assert address_of(view) == part.ctypes.data == whole.ctypes.data + first * 6 * whole.itemsize


@pytest.mark.parametrize("view", [memoryview(b""), memoryview(bytearray())])
def test_an_empty_view_has_no_address(view: memoryview) -> None:
    assert address_of(view) == 0


def test_views_of_an_address_are_its_memory_and_can_be_written() -> None:
    memory = bytearray(range(100))
    address = address_of(memoryview(memory)) + 10
    view, column = view_at(address, 50), bytes_at(address, 50, memory)
    assert (view.nbytes, view.format, view.ndim, view.readonly, address_of(view)) == (50, "B", 1, False, address)
    assert bytes(view) == column.tobytes() == bytes(range(10, 60))
    view[0], column[49] = 200, 201
    assert (memory[10], memory[59]) == (200, 201)
