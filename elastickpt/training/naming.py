"""The canonical names of what a module holds: its parameters, persistent buffers and extra states.

Before -> after, for a model under DDP and `torch.compile` with one block under an activation-checkpoint wrapper:
    module._orig_mod.blocks.0._checkpoint_wrapped_module.weight -> blocks.0.weight
A level is left out because of the wrapper's type, never because of its text: a submodule that is really called `module`
or `_orig_mod` keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from elastickpt.errors import ValueNotCarried
from elastickpt.format.limits import MAX_NAME_NBYTES
from elastickpt.training.loaded import is_loaded_instance

# The one child through which each wrapper holds what it wraps: (module of the type, type, attribute).
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
)


@dataclass(frozen=True, slots=True, eq=False)
class NamedTensor:
    """A parameter or persistent buffer: the object that `owner` has registered as `attribute`.

    `name` is canonical. `wrappers` are the wrapper modules around it, outermost first.
    """

    name: str
    tensor: torch.Tensor
    role: Literal["parameter", "buffer"]
    owner: nn.Module
    attribute: str
    wrappers: tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True, eq=False)
class NamedModule:
    """A module that overrides `get_extra_state`; `name` is canonical, "" for the root."""

    name: str
    module: nn.Module


def wrapped_attribute(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds the module that it wraps; None for a module that is no wrapper."""
    for where, cls, attribute in _WRAPPERS:
        if is_loaded_instance(module, where, cls):
            return attribute
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers around it."""
    while (attribute := wrapped_attribute(module)) is not None:
        inner = module._modules[attribute]
        if inner is None:
            break
        module = inner
    return module


def walk(module: nn.Module) -> Iterator[NamedTensor | NamedModule]:
    """All of `module` that a checkpoint carries, in state-dict order: parameters, buffers, extra state, children.

    A tensor or module that is registered in several places is yielded once for each name. Raises ValueNotCarried, by
    name, for a module that keeps state in a place where no name leads to, and for a name over 1024 bytes.
    """
    yield from _walk(module, "", (), frozenset())


def _walk(
    module: nn.Module, prefix: str, wrappers: tuple[nn.Module, ...], above: frozenset[int]
) -> Iterator[NamedTensor | NamedModule]:
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield NamedTensor(_checked(prefix + attribute), parameter, "parameter", module, attribute, wrappers)
    for attribute, buffer in module._buffers.items():
        if buffer is not None and attribute not in module._non_persistent_buffers_set:
            yield NamedTensor(_checked(prefix + attribute), buffer, "buffer", module, attribute, wrappers)
    name = prefix.removesuffix(".")
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        yield NamedModule(_checked(name), module)
    if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
        _require_covered(module, name)
    inner = wrapped_attribute(module)
    above |= {id(module)}
    for attribute, child in module._modules.items():
        if child is None or id(child) in above:
            continue
        if attribute == inner:
            yield from _walk(child, prefix, (*wrappers, module), above)
        else:
            yield from _walk(child, f"{prefix}{attribute}.", wrappers, above)


def _checked(name: str) -> str:
    nbytes = len(name.encode(errors="surrogatepass"))  # what is no text is refused where all names are checked
    if nbytes > MAX_NAME_NBYTES:
        raise ValueNotCarried(f"name {name[:80]!r}... has {nbytes} bytes, expected at most {MAX_NAME_NBYTES}")
    return name


def _require_covered(module: nn.Module, name: str) -> None:
    """Refuses a module whose state dict has entries beside its registered tensors: they would be lost silently."""
    entries: dict[str, object] = {}
    module._save_to_state_dict(entries, "", True)
    hidden = sorted(entries.keys() - module._parameters.keys() - module._buffers.keys() - {"_extra_state"})
    if hidden:
        raise ValueNotCarried(
            f"module {name!r} ({type(module).__name__}) writes {', '.join(map(repr, hidden))} into its state dict, "
            f"which are no parameters, buffers or extra state of it: register them as buffers, or return them from "
            f"get_extra_state"
        )
