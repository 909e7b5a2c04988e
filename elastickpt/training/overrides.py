"""Which modules save or load in a way of their own, told by their class and hooks alone; and what they then say.

Modules that do neither, nearly all, are known by their registered tensors, and none of their code runs in a save. What torch
itself overrides or registers without adding contents is listed here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from elastickpt.errors import ValueNotCarried
from elastickpt.training.local_only import collectives_refused

# Their hooks bring sharded parameters back, take wrappers' names away or write down versions: nothing that names do not say.
_SHARDING_HOOKS = frozenset(
    (
        "torch.distributed.fsdp._fully_shard._fsdp_param",
        "torch.distributed.fsdp._fully_shard._fsdp_param_group",
        "torch.distributed.fsdp._state_dict_utils",
    )
)
_HARMLESS_HOOKS = _SHARDING_HOOKS | frozenset(
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "torch.nn.utils.spectral_norm",
    )
)
# They supply counters to checkpoints of before torch 0.4.1.
_HARMLESS_LOADING = frozenset(cls._load_from_state_dict for cls in (nn.Module, _NormBase, _InstanceNorm))


def saves_by_itself(module: nn.Module) -> bool:
    """Whether a module's state dict may have anything beside or instead of its registered tensors."""
    cls = type(module)
    return (
        cls._save_to_state_dict is not nn.Module._save_to_state_dict
        or cls.state_dict is not nn.Module.state_dict
        or bool(module._state_dict_hooks and _any_own(module._state_dict_hooks))
        or bool(module._state_dict_pre_hooks and _any_own(module._state_dict_pre_hooks))
        or "state_dict" in module.__dict__
    )


def loads_by_itself(module: nn.Module) -> bool:
    """Whether a module does anything else on loading than to fill its registered tensors."""
    cls = type(module)
    return (
        cls._load_from_state_dict not in _HARMLESS_LOADING
        or cls.load_state_dict is not nn.Module.load_state_dict
        or bool(module._load_state_dict_pre_hooks and _any_own(module._load_state_dict_pre_hooks))
        or bool(module._load_state_dict_post_hooks and _any_own(module._load_state_dict_post_hooks))
        or "load_state_dict" in module.__dict__
    )


def overrides_state_dict(module: nn.Module) -> bool:
    """Whether a module has a `state_dict` of its own, as wrappers that hand on to what they wrap do."""
    return type(module).state_dict is not nn.Module.state_dict


def _any_own(hooks: Mapping[int, Any]) -> bool:
    return any(_home(hook) not in _HARMLESS_HOOKS for hook in hooks.values())


def without_sharding(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """Hooks without those of torch's own sharding, which want real shards."""
    return {number: hook for number, hook in hooks.items() if _home(hook) not in _SHARDING_HOOKS}


def _home(hook: Any) -> str:
    """The module that a hook was written in: of a function, a method, or an object that is called."""
    inner = getattr(hook, "hook", hook)  # torch wraps those that get their module
    while isinstance(inner, partial):
        inner = inner.func
    home = getattr(inner, "__module__", None)
    return home if isinstance(home, str) else type(inner).__module__


def own_state_dict(module: nn.Module, *, name: str, root: bool) -> Mapping[str, Any]:
    """What the module's `state_dict` says, its own code and hooks included; keys below `name`, "" at the root.

    A root is called as users call it, a part of a model as its parent does. Raises ValueNotCarried if it begins a collective,
    or if what it returns is no mapping of texts.
    """
    found: object
    with collectives_refused(f"the state dict of {titled(name, module)}"):
        if root:
            found = module.state_dict()
        else:
            found = module.state_dict(destination=_destination(), prefix=below(name), keep_vars=False)
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise ValueNotCarried(f"{titled(name, module)}: its state dict is no mapping of names to contents")
    return found


def titled(name: str, module: nn.Module) -> str:
    """A module in a message."""
    return f"module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def below(name: str) -> str:
    """What the names of a module's contents begin with."""
    return f"{name}." if name else ""


def covering(names: Iterable[str], key: str) -> bool:
    """Whether one of these modules is above (or is) what the key names."""
    return any(not name or key == name or key.startswith(f"{name}.") for name in names)


def _destination() -> Any:
    """An empty state dict as torch makes it."""
    made: Any = OrderedDict()
    made._metadata = OrderedDict()
    return made
