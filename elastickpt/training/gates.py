"""Copies that go on while training does, and what keeps an optimizer from changing tensors before they are done."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer
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


class Beside(Protocol):
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
    """Steps of the optimizers that it watches come after the copies under way: by an order on the device where that can be,
    else by waiting."""

    def __init__(self) -> None:
        self._under_way: list[tuple[Copies, Callable[[], bool]]] = []
        self._changing = threading.Lock()
        # Hooks stay once they are there: removing one from another thread could meet a step that goes through them.
        self._hooks: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()

    def watch(self, state: Mapping[str, object]) -> None:
        """Every optimizer among the entries of `state`."""
        for value in state.values():
            if isinstance(value, Optimizer) and value not in self._hooks:
                self._hooks[value] = value.register_step_pre_hook(_Hook(self))

    def close_for(self, copies: Copies, *, until: Callable[[], bool]) -> None:
        """The copies count from now on, until `until` says that they are done."""
        with self._changing:
            self._under_way.append((copies, until))

    def pass_through(self) -> None:
        """Called before a step."""
        with self._changing:
            self._under_way = [(copies, done) for copies, done in self._under_way if not done()]
            under_way = list(self._under_way)
        for copies, _ in under_way:
            copies.order_before_step()

    def open(self) -> None:
        """Takes the hooks away again; on the thread that trains."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()


class _Hook:
    """A pre-hook of an optimizer, which it does not take along when it is copied or pickled."""

    def __init__(self, gate: StepGate) -> None:
        self._gate = weakref.ref(gate)

    def __call__(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        if (gate := self._gate()) is not None:
            gate.pass_through()

    def __reduce__(self) -> tuple[type[_Passed], tuple[()]]:
        return _Passed, ()


class _Passed:
    """What a copy of an optimizer has in a hook's place."""

    def __call__(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        return None
