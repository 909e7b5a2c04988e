"""Optimizers whose state exists through an override or an optimizer inside only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class Outer(Optimizer):
    """A container: the one inside has all the state."""

    def __init__(self, params: Iterable[Any]) -> None:
        params = list(params)
        self.inner = torch.optim.Adam(params)
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


class Hidden(Outer):
    """The same, where no attribute leads to the optimizer inside."""

    def __init__(self, params: Iterable[Any]) -> None:
        params = list(params)
        super().__init__(params)
        inner = self.__dict__.pop("inner")
        self.get = lambda: inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.get().step()

    def state_dict(self) -> Any:
        return self.get().state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.get().load_state_dict(state_dict)


class Two(Optimizer):
    """Matrices by one, the rest by another; groups are those of both."""

    def __init__(self, params: Iterable[Any]) -> None:
        params = list(params)
        self.optimizers = [
            torch.optim.SGD([p for p in params if p.ndim > 1], lr=0.1, momentum=0.9),
            torch.optim.AdamW([p for p in params if p.ndim == 1], lr=0.01),
        ]
        super().__init__([group for one in self.optimizers for group in one.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.optimizers:
            one.step()

    def state_dict(self) -> Any:
        return [one.state_dict() for one in self.optimizers]

    def load_state_dict(self, state_dict: Any) -> None:
        for one, own in zip(self.optimizers, state_dict, strict=True):
            one.load_state_dict(own)


class Apart(Optimizer):
    """Like `Two`, but torch's own __init__ was never called, and the state dict goes by name."""

    def __init__(self, params: Iterable[Any]) -> None:
        self.by_name = dict(zip(("first", "second"), Two(params).optimizers, strict=True))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.by_name.values():
            one.step()

    def state_dict(self) -> Any:
        return {name: one.state_dict() for name, one in self.by_name.items()}

    def load_state_dict(self, state_dict: Any) -> None:
        for name, one in self.by_name.items():
            one.load_state_dict(state_dict[name])


class Delegating(Optimizer):
    """A wrapper: states and groups are those of the one inside, by property."""

    def __init__(self, params: Iterable[Any]) -> None:
        self.optimizer = torch.optim.AdamW(params, lr=0.01)

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)


class Aliasing(Delegating):
    """A wrapper that took the dicts of the one inside when it was made."""

    state = None  # type: ignore[assignment]
    param_groups = None  # type: ignore[assignment]

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups


class Slow(Optimizer):
    """Lookahead as libraries have it: fast states inside, slow weights outside, groups shared."""

    def __init__(self, params: Iterable[Any]) -> None:
        self.optimizer = torch.optim.Adam(params, lr=0.01)
        self.param_groups = self.optimizer.param_groups
        self.state = defaultdict(dict)
        self.fast_state = self.optimizer.state
        for group in self.param_groups:
            group["counter"] = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        for group in self.param_groups:
            if group["counter"] == 0:
                for p in group["params"]:
                    slow = self.state[p].setdefault("slow_param", p.detach().clone())
                    p.data.mul_(0.5).add_(slow, alpha=0.5)
                    slow.copy_(p.data)
            group["counter"] = (group["counter"] + 1) % 3

    def state_dict(self) -> Any:
        places = {id(p): k for k, p in enumerate(self.param_groups[0]["params"])}
        fast = self.optimizer.state_dict()
        slow = {places[id(p)]: states for p, states in self.state.items()}
        return {"fast_state": fast["state"], "slow_state": slow, "param_groups": fast["param_groups"]}

    def load_state_dict(self, state_dict: Any) -> None:
        groups = state_dict["param_groups"]
        self.optimizer.load_state_dict({"state": state_dict["fast_state"], "param_groups": groups})
        self.param_groups = self.optimizer.param_groups
        params = self.param_groups[0]["params"]
        self.state = defaultdict(dict, {params[k]: states for k, states in state_dict["slow_state"].items()})
        self.fast_state = self.optimizer.state


class Averaging(torch.optim.SGD):
    """State beside torch's: an average per parameter, in an attribute, with a count."""

    key: Callable[[int, nn.Parameter], Any] = staticmethod(lambda index, parameter: index)

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.averages: dict[Any, torch.Tensor] = {}
        self.count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.count += 1
        for p in self.param_groups[0]["params"]:
            average = self.averages.setdefault(p, torch.zeros_like(p))
            average.add_(p.detach(), alpha=1 / self.count)
            p.data.lerp_(average, 0.1)

    def state_dict(self) -> Any:
        found = super().state_dict()
        found["count"] = self.count
        found["averages"] = {
            type(self).key(k, p): self.averages[p] for k, p in enumerate(self.param_groups[0]["params"]) if p in self.averages
        }
        return found

    def load_state_dict(self, state_dict: Any) -> None:
        state_dict = dict(state_dict)
        self.count = state_dict.pop("count")
        averages = state_dict.pop("averages")
        self.averages = {
            p: averages[type(self).key(k, p)].clone()
            for k, p in enumerate(self.param_groups[0]["params"])
            if type(self).key(k, p) in averages
        }
        super().load_state_dict(state_dict)


class AveragingByPair(Averaging):
    key = staticmethod(lambda index, parameter: (0, index))


class AveragingByParameter(Averaging):
    key = staticmethod(lambda index, parameter: parameter)


class AveragingInState(Averaging):
    """The average stands among torch's states, in the state dict only."""

    def state_dict(self) -> Any:
        found = super().state_dict()
        averages = found.pop("averages")
        found["state"] = {k: {**states, "average": averages[k].clone()} for k, states in found["state"].items()}
        return found

    def load_state_dict(self, state_dict: Any) -> None:
        own = {k: dict(states) for k, states in state_dict["state"].items()}
        averages = {k: states.pop("average") for k, states in own.items()}
        super().load_state_dict({**state_dict, "state": own, "averages": averages})


class Packed(torch.optim.SGD):
    """States are kept as int8 codes and a scale; the state dict has them unpacked, and packing again may lose bits."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, lr=0.1)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            states = self.state[p]
            momentum = states["codes"] * states["scale"] if states else torch.zeros_like(p)
            momentum = 0.9 * momentum + p.grad
            p.data.sub_(0.1 * momentum)
            states["scale"] = momentum.abs().max() / 100
            states["codes"] = (momentum / states["scale"]).to(torch.int8)

    def state_dict(self) -> Any:
        found = super().state_dict()
        found["state"] = {k: {"momentum": one["codes"] * one["scale"]} for k, one in found["state"].items()}
        return found

    def load_state_dict(self, state_dict: Any) -> None:
        for p, one in zip(self.param_groups[0]["params"], state_dict["state"].values(), strict=False):
            momentum = one["momentum"]
            self.state[p]["scale"] = momentum.abs().max() / 90
            self.state[p]["codes"] = (momentum / self.state[p]["scale"]).to(torch.int8)


class Nesting(torch.optim.AdamW):
    """Hides its tensors one level deeper in the state dict, as bitsandbytes does."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, lr=0.01)

    def state_dict(self) -> Any:
        found = super().state_dict()
        found["state"] = {
            k: {"step": one["step"], "hidden": {name: one[name] for name in ("exp_avg", "exp_avg_sq")}}
            for k, one in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: Any) -> None:
        state = {k: {"step": one["step"], **one["hidden"]} for k, one in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state})


class Flat(torch.optim.SGD):
    """Loading makes one buffer of all states; they are views of it."""

    flat: torch.Tensor

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        params = [p for p in self.param_groups[0]["params"] if "momentum_buffer" in self.state[p]]
        self.flat = torch.cat([self.state[p]["momentum_buffer"].flatten() for p in params])
        for p, part in zip(params, self.flat.split([p.numel() for p in params]), strict=True):
            self.state[p]["momentum_buffer"] = part.view(p.shape)


class Noting(torch.optim.SGD):
    """Entries of every form beside torch's own: numbers, a tensor, a dict under tuples, an option of a group."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, lr=0.1)
        self.notes: dict[Any, Any] = {}
        self.scale = torch.zeros(3)

    def state_dict(self) -> Any:
        found = super().state_dict()
        found["notes"] = dict(self.notes)
        found["scale"] = self.scale
        found["param_groups"][0]["seen"] = self.notes.get("count", 0)
        return found

    def load_state_dict(self, state_dict: Any) -> None:
        state_dict = dict(state_dict)
        self.notes = state_dict.pop("notes")
        self.scale = state_dict.pop("scale")
        self.seen = state_dict["param_groups"][0]["seen"]
        super().load_state_dict(state_dict)
