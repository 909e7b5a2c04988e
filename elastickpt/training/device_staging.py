"""From CUDA tensors into pinned host memory on a stream of its own, beside the next forward and backward."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from elastickpt.errors import LayoutUnsupported


class DeviceStaging:
    """Copies to memory that stays pinned as long as this object is not closed.

    `memory`: shape=[nbytes], uint8, page-aligned. The order of use: `begin`, `copy` for each slice, `end`; then
    `order_before` or `wait` before anything changes the tensors (the optimizer's next step).
    """

    def __init__(self, memory: NDArray[np.uint8], device: torch.device) -> None:
        self._memory = memory
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            _demand(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0), "pin")

    def begin(self) -> None:
        """What is copied from now on is as it is once all work given to the current stream so far is done."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def copy(self, part: torch.Tensor, start: int, into: NDArray[np.uint8]) -> None:
        """Bytes of `part` from `start` on, in C order, fill `into`, a view of `memory`; not blocking."""
        with torch.cuda.stream(self._stream):
            flat = part.detach().contiguous().view(-1).view(torch.uint8)
            torch.from_numpy(into).copy_(flat[start : start + into.size], non_blocking=True)
            flat.record_stream(self._stream)

    def end(self) -> None:
        """Everything was given to the stream: `wait` waits for it."""
        self._done.record(self._stream)

    def order_before(self, streams: Iterable[torch.cuda.Stream]) -> None:
        """Work that these streams are given from now on begins when the copies are done; not blocking."""
        for stream in streams:
            stream.wait_event(self._done)

    def order_before_step(self) -> None:
        """The same for the stream of the caller, on which an optimizer steps."""
        self.order_before([torch.cuda.current_stream(self._stream.device)])

    def wait(self) -> None:
        """All copies are done: a writer may read them. Blocking."""
        self._done.synchronize()

    def close(self) -> None:
        """Waits, and gives the memory back to the pager."""
        self._stream.synchronize()
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        _demand(runtime.cudaHostUnregister(self._memory.ctypes.data), "unpin")


def _demand(code: object, what: str) -> None:
    if int(code) != 0:  # type: ignore[call-overload]  # an enum of cudart without a stub
        raise LayoutUnsupported(f"cannot {what} the staging arena for the GPU: {code}")
