"""Protocols as generators: they pause before every operation on the store, so that whoever drives them may let others go first.

    view = complete(read_view(store))

Between two pauses a generator does at most one operation. What it yields is how long to wait: `NOW`, or seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[float, None, T]
NOW = 0.0


def complete(steps: Steps[T], *, sleep: Callable[[float], object] = time.sleep) -> T:
    """What the steps return, all of them done one after the other; blocking. `sleep` takes seconds."""
    while True:
        try:
            pause_s = next(steps)
        except StopIteration as done:
            result: T = done.value
            return result
        if pause_s > NOW:
            sleep(pause_s)
