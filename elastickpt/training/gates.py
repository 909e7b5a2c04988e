"""Copies that go on while training does, and what keeps an optimizer from changing tensors before they are done."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from elastickpt.training.device_staging import DeviceStaging
from elastickpt.training.held import HeldArray


class Copies(Protocol):
    """Copies beside training; see `device_staging.DeviceStaging`, which is this for CUDA."""

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
