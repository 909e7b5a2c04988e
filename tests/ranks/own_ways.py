"""Modules that save and load in ways of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SD = dict[str, Any]


class Metric(nn.Module):
    """The way of metric libraries: what counts is a plain attribute, and the class has a default for all."""

    total = torch.tensor(0.0)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        destination[prefix + "total"] = self.total
        return destination

    def _load_from_state_dict(self, sd: SD, prefix: str, *rest: Any) -> None:
        self.total = sd.pop(prefix + "total")


class Derived(nn.Linear):
    """What is derived from the weight is computed by a hook after loading, or by an override."""

    def __init__(self, how: str) -> None:
        super().__init__(2, 2, bias=False)
        self.norm = 0.0
        self.how = how
        if how == "post":
            self.register_load_state_dict_post_hook(lambda m, keys: m.derive())

    def derive(self) -> None:
        self.norm = self.weight.norm().item()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.how == "override":
            self.derive()


class Renames(nn.Module):
    """Takes checkpoints of the time when `new` was called `old`, and had a buffer more."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(2, 2)
        self.register_load_state_dict_pre_hook(Renames.migrate)

    def migrate(self, sd: SD, prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}old.{name}" in sd:
                sd[f"{prefix}new.{name}"] = sd.pop(f"{prefix}old.{name}")
        sd.pop(prefix + "obsolete", None)


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.old = nn.Linear(2, 2)
        self.register_buffer("obsolete", torch.ones(5))
