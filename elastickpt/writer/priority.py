"""Lower priority for a process that works beside training. Linux keeps both per thread; threads made later inherit them."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from typing import Literal

IoPriority = Literal["normal", "low", "idle"]

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # numbers of the system call, which libc does not wrap
_LEVELS = {"low": (2 << 13) | 7, "idle": 3 << 13}  # class in the upper bits: 2 is best effort, with a level; 3 is idle
_THIS_THREAD = (1, 0)  # IOPRIO_WHO_PROCESS, the caller


def lower(niceness: int, io: str) -> None:
    """Applies to the calling thread and to threads that it makes from now on; what the system refuses is left as it is."""
    if niceness:
        with suppress(OSError):
            os.nice(niceness)
    call = _IOPRIO_SET.get(platform.machine())
    if io in _LEVELS and call is not None:
        ctypes.CDLL(None).syscall(call, *_THIS_THREAD, _LEVELS[io])
