"""What a device does of a save beside what it computes: copies into pinned host memory on a stream of its own, a digest of its
own bytes, and gates that keep an optimizer from changing tensors before their copies are done.

The digest is two sums, modulo 2^64, over the bytes as words of 8, each stirred with its place by the finalizer of SplitMix64
(Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014). It finds what changed by accident; it is no
proof against intent.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from elastickpt.errors import LayoutUnsupported
from elastickpt.training.held import HeldArray

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


class Copies(Protocol):
    """Copies beside training; see `DeviceStaging`, which is this for CUDA."""

    def begin(self) -> None: ...

    def copy(self, part: torch.Tensor, start: int, into: NDArray[np.uint8]) -> None: ...

    def end(self) -> None: ...

    def order_before_step(self) -> None:
        """What the caller gives the device from now on begins when the copies are done; else blocks until they are."""
        ...

    def wait(self) -> None: ...

    def close(self) -> None: ...


class DeviceCopier(Protocol):
    """Which arrays are copied beside training, and by whom."""

    def device(self, held: HeldArray) -> str | None:
        """The device whose stream copies the array; None: it is staged before the call returns."""
        ...

    def copies(self, memory: NDArray[np.uint8], device: str) -> Copies:
        """For an arena, for good."""
        ...


class Cuda:
    """Parameters and their optimizer state on the current CUDA device. Buffers are changed by the next forward, and all else
    by whoever likes: they are staged at once, as are tensors on other devices."""

    def device(self, held: HeldArray) -> str | None:
        device = held.tensor.device
        if held.role != "parameter" or device.type != "cuda" or device.index != torch.cuda.current_device():
            return None
        return str(device)

    def copies(self, memory: NDArray[np.uint8], device: str) -> Copies:
        return DeviceStaging(memory, torch.device(device))


class StepGate:
    """Steps of all optimizers of this process come after the copies under way: by an order on the device where that can be,
    else by waiting. Of all, as those that change what is copied need not be in the state that is saved."""

    def __init__(self) -> None:
        self._under_way: list[tuple[Copies, Callable[[], bool]]] = []
        self._changing = threading.Lock()
        # It stays once it is there: removing it from another thread could meet a step that goes through it.
        self._hook: RemovableHandle | None = None

    def close_for(self, copies: Copies, *, until: Callable[[], bool]) -> None:
        """The copies count from now on, until `until` says that they are done. On the thread that trains."""
        with self._changing:
            self._under_way.append((copies, until))
        if self._hook is None:
            self._hook = register_optimizer_step_pre_hook(_passing(weakref.ref(self)))

    def pass_through(self) -> None:
        """Called before a step."""
        with self._changing:
            self._under_way = [(copies, done) for copies, done in self._under_way if not done()]
            under_way = list(self._under_way)
        for copies, _ in under_way:
            copies.order_before_step()

    def open(self) -> None:
        """Takes the hook away again; on the thread that trains."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _passing(gate: weakref.ref[StepGate]) -> Callable[[Optimizer, Any, Any], None]:
    """A hook that does not keep the gate."""

    def pass_through(optimizer: Optimizer, arguments: Any, options: Any) -> None:
        if (live := gate()) is not None:
            live.pass_through()

    return pass_through
