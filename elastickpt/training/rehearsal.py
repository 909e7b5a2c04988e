"""Trying out how a model would load, without contents: what its hooks rename, take and refuse, before anything changes.

All tensors of the model are meta tensors meanwhile, those of the state dict too; then every module is as it was. Code that
needs contents (`item()`, a branch on a value) cannot be tried out: then only loading itself will tell.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from elastickpt.errors import CheckpointError
from elastickpt.training.entries import collectives_refused, titled, without_sharding


@dataclass(slots=True, eq=False)
class Rehearsed:
    """What loading said: keys that it missed and keys that it did not take; `refused` if it raised what torch raises for
    shapes that differ. `renamed`: keys of the model's own state dict to the key whose contents came there unchanged."""

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    refused: bool = False
    renamed: dict[str, str] = field(default_factory=dict)


def hollow(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape and element type without contents."""
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")


def rehearse(module: nn.Module, entries: Mapping[str, Any]) -> Rehearsed | None:
    """Loads `entries`, whose tensors are hollow, into the module made hollow. None if it cannot be tried out."""
    if any(isinstance(one, torch.jit.ScriptModule) for one in module.modules()):
        return None
    copies = _Copies()
    try:
        with _hollowed(module) as places:
            try:
                with collectives_refused(f"the loading of {titled('', module)}"), copies:
                    missing, unexpected = load_entries(module, entries)
            except RuntimeError as error:
                return Rehearsed(refused=True) if "Error(s) in loading state_dict" in str(error) else None
            sources = {id(value): key for key, value in entries.items() if isinstance(value, torch.Tensor)}
            filled = {id(tensor): key for key, tensor in places.items()}
            pairs = ((filled[to], sources[of]) for to, of in copies.seen if to in filled and of in sources)
            return Rehearsed(missing, unexpected, renamed={to: of for to, of in pairs if to != of})
    except CheckpointError:
        raise
    except Exception:
        return None


def load_entries(module: nn.Module, entries: Mapping[str, Any]) -> tuple[frozenset[str], frozenset[str]]:
    """Calls the module's own `load_state_dict`; what it says is missing and unexpected (nothing, if it says nothing)."""
    try:
        result: Any = module.load_state_dict(entries, strict=False)
    except TypeError as error:
        if "strict" not in str(error):
            raise
        result = module.load_state_dict(entries)  # an override without that argument
    missing, unexpected = getattr(result, "missing_keys", ()), getattr(result, "unexpected_keys", ())
    return frozenset(missing), frozenset(unexpected)


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which tensors were copied into which, whole."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].shape == args[1].shape and args[0].dtype == args[1].dtype:
            self.seen.append((id(args[0]), id(args[1])))
        return func(*args, **(kwargs or {}))


_COPIED = (dict, OrderedDict, list, set, deque)


@contextmanager
def _hollowed(module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The module with hollow tensors, by key as torch walks them; everything that its modules hold is put back."""
    modules = list(module.modules())
    before = [(one, dict(one.__dict__)) for one in modules]
    contents = [(each, type(each)(each)) for _, own in before for each in own.values() if type(each) in _COPIED]
    hollows: dict[int, torch.Tensor] = {}
    kept: list[torch.Tensor] = []  # so that no identity is used twice

    def emptied(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in hollows:
            made = hollow(tensor)
            hollows[id(tensor)] = nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
            kept.append(tensor)
        return hollows[id(tensor)]

    try:
        for one in modules:
            for hooks in (one._load_state_dict_pre_hooks, one._load_state_dict_post_hooks):
                if hooks:
                    left = without_sharding(hooks)
                    hooks.clear()
                    hooks.update(left)
            for registered in (cast(dict[str, Any], one._parameters), cast(dict[str, Any], one._buffers)):
                for attribute, tensor in registered.items():
                    if tensor is not None:
                        registered[attribute] = emptied(tensor)
            for attribute, value in list(one.__dict__.items()):
                if isinstance(value, torch.Tensor):
                    one.__dict__[attribute] = emptied(value)
        tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        yield dict(tensors)
    finally:
        for each, copy in contents:
            each.clear()
            (each.extend if isinstance(each, (list, deque)) else each.update)(copy)
        for one, own in before:
            one.__dict__.clear()
            one.__dict__.update(own)
