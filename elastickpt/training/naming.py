"""The canonical names of what a module holds: its parameters, persistent buffers and extra states.

Before -> after, for a model under DDP and `torch.compile` with one block under an activation-checkpoint wrapper:
    module._orig_mod.blocks.0._checkpoint_wrapped_module.weight -> blocks.0.weight
A level is left out because of the wrapper's type, never because of its text: a submodule that is really called `module`
or `_orig_mod` keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import nn

from elastickpt.errors import ValueNotCarried
from elastickpt.format.version import MAX_NAME_NBYTES
from elastickpt.training.elements import is_loaded_instance, loaded_type
from elastickpt.training.entries import loads_by_itself, overrides_state_dict, own_state_dict, saves_by_itself
from elastickpt.training.known_memory import spans_of

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


Trait = Literal["extra state", "own saving", "own loading"]


@dataclass(frozen=True, slots=True, eq=False)
class NamedModule:
    """A module with code of its own for its state; `name` is canonical, "" for the root.

    `traits`: "extra state", it overrides `get_extra_state`; "own saving" and "own loading" as in `overrides`.
    """

    name: str
    module: nn.Module
    traits: frozenset[Trait]


def wrapped_attribute(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds the module that it wraps; None for a module that is no wrapper."""
    return _attribute_of(type(module))  # type: ignore[arg-type]  # classes have hashes, whatever their objects have


@lru_cache(maxsize=1024)  # a class that exists has all of its bases: which modules are loaded later changes nothing
def _attribute_of(cls: type) -> str | None:
    for where, name, attribute in _WRAPPERS:
        wrapper = loaded_type(where, name)
        if wrapper is not None and issubclass(cls, wrapper):
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
    """All of `module` that a checkpoint carries: each module with code of its own, then its parameters, buffers, children.

    A tensor or module that is registered in several places is yielded once for each name. What a module registers is looked
    at after it was yielded. Raises ValueNotCarried for a name over 1024 bytes; a wrapper that none here knows is asked for
    its state dict.
    """
    yield from _walk(module, "", (), frozenset())


def _walk(
    module: nn.Module, prefix: str, wrappers: tuple[nn.Module, ...], above: frozenset[int]
) -> Iterator[NamedTensor | NamedModule]:
    name = prefix.removesuffix(".")
    if traits := _traits(module):
        yield NamedModule(_checked(name), module, traits)
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield NamedTensor(_checked(prefix + attribute), parameter, "parameter", module, attribute, wrappers)
    for attribute, buffer in module._buffers.items():
        if buffer is not None and attribute not in module._non_persistent_buffers_set:
            yield NamedTensor(_checked(prefix + attribute), buffer, "buffer", module, attribute, wrappers)
    inner, only = wrapped_attribute(module), None
    if inner is None and "own saving" in traits:
        inner = only = delegate_of(module)
    above |= {id(module)}
    for attribute, child in module._modules.items():
        if child is None or id(child) in above or only not in (None, attribute):
            continue
        if attribute == inner:
            yield from _walk(child, prefix, (*wrappers, module), above)
        else:
            yield from _walk(child, f"{prefix}{attribute}.", wrappers, above)


def _traits(module: nn.Module) -> frozenset[Trait]:
    extra = type(module).get_extra_state is not nn.Module.get_extra_state
    saves, loads = saves_by_itself(module), loads_by_itself(module)
    if not (extra or saves or loads):
        return _NONE
    flags: tuple[tuple[Trait, bool], ...] = (("extra state", extra), ("own saving", saves), ("own loading", loads))
    return frozenset(trait for trait, has in flags if has)


_NONE: frozenset[Trait] = frozenset()


def delegate_of(module: nn.Module) -> str | None:
    """The child whose names are those of a wrapper's own state dict, which proves that the wrapper adds no level to names.

    Everything that the wrapper holds must be in that child, as far as it is persistent. None for a module that is no such
    wrapper; one with tensors of its own is none.
    """
    if not overrides_state_dict(module) or module._parameters or module._buffers or not module._modules:
        return None
    said = own_state_dict(module, name="", root=True)
    for attribute, child in module._modules.items():
        inside = {} if child is None else {one.name: one.tensor for one in walk(child) if isinstance(one, NamedTensor)}
        if inside and all(_is_that(said.get(name), tensor) for name, tensor in inside.items()):
            held = {id(tensor) for tensor in inside.values()}
            others = (other for other in module._modules.values() if other is not None and other is not child)
            every = (one for other in others for one in walk(other) if isinstance(one, NamedTensor))
            if all(id(one.tensor) in held for one in every):
                return attribute
    return None


def _is_that(found: object, tensor: torch.Tensor) -> bool:
    if not isinstance(found, torch.Tensor) or found.shape != tensor.shape:
        return False
    return found is tensor or spans_of(found) == spans_of(tensor)


@dataclass(frozen=True, slots=True, eq=False)
class KeyPath:
    """A key of a module's state dict, followed through its modules: its canonical form, and the modules on its way, each
    with its canonical name, outermost first."""

    name: str
    modules: tuple[tuple[str, nn.Module], ...]


class ModuleKeys:
    """The keys of one module's own state dict, followed to what they name; `under` is the module's canonical name."""

    def __init__(self, module: nn.Module, *, under: str = "") -> None:
        self._module, self._under = module, under
        self._delegates: dict[int, str | None] = {}

    def follow(self, key: str) -> KeyPath:
        """For a model whose `block` is compiled: "block._orig_mod.scale" -> "block.scale"."""
        tokens, at = key.split("."), 0
        module, names = self._module, [self._under] if self._under else []
        modules = [(self._under, module)]
        while at < len(tokens) - 1:
            known = wrapped_attribute(module)
            inner = known or self._delegate(module)
            if inner is None:
                names.append(tokens[at])
            child = module._modules.get(inner or tokens[at])
            at += inner is None or known == tokens[at]  # a wrapper may leave its level out by itself
            if child is None:
                break
            module = child
            modules.append((".".join(names), module))
        return KeyPath(".".join((*names, *tokens[at:])), tuple(modules))

    def key_of(self, name: str) -> str:
        """The key for a canonical name of which the state dict has none: as torch would make it."""
        module, key, rest = self._module, "", name
        while True:
            known = wrapped_attribute(module)
            inner = known or self._delegate(module)
            if inner is None and "." not in rest:
                return key + rest
            first = inner or rest.partition(".")[0]
            child = module._modules.get(first)
            if child is None:
                return key + rest
            if inner is None:
                rest = rest.partition(".")[2]
            if inner is None or (known is not None and not _leaves_itself_out(module)):
                key += f"{first}."
            module = child

    def _delegate(self, module: nn.Module) -> str | None:
        if not overrides_state_dict(module):
            return None
        if id(module) not in self._delegates:
            self._delegates[id(module)] = delegate_of(module)
        return self._delegates[id(module)]


def _leaves_itself_out(wrapper: nn.Module) -> bool:
    where, cls, _ = _WRAPPERS[-1]
    return is_loaded_instance(wrapper, where, cls)


def _checked(name: str) -> str:
    nbytes = len(name.encode(errors="surrogatepass"))  # what is no text is refused where all names are checked
    if nbytes > MAX_NAME_NBYTES:
        raise ValueNotCarried(f"name {name[:80]!r}... has {nbytes} bytes, expected at most {MAX_NAME_NBYTES}")
    return name
