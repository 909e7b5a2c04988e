"""Entries of `state` run code of their own (state dicts, loading, hooks): which of them, whose it was that raised, and what had
changed.

On saving and binding nothing has changed yet. While a Binding is installed entries change one after the other; what the
error then says is enough to know which of them hold the checkpoint's contents and which still hold their own.

Modules that neither save nor load in a way of their own, nearly all, are known by their registered tensors, and none of their
code runs in a save. Class and hooks alone tell; what torch itself overrides or registers without adding contents stands here.

Such code is that of one rank: a collective in it would wait for ranks that do not call it too. Every collective, of c10d or of
a DTensor, goes through torch's dispatcher, where it is stopped before it begins.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from elastickpt.errors import CheckpointError, EntryFailed, ValueNotCarried

_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")
_LOCAL = frozenset(("_c10d_functional::wait_tensor", "_c10d_functional_autograd::wait_tensor"))


class _NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    def __init__(self, who: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._who = who

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.split("::")[0] in _COLLECTIVES and name.split(".")[0] not in _LOCAL:
            raise ValueNotCarried(
                f"{self._who} starts a collective ({name.split('.')[0]}), which saving and loading never do: gather before, "
                f"or keep what it gives in a buffer or a state"
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def collectives_refused(who: str) -> Iterator[None]:
    """Inside, a collective that this thread starts raises ValueNotCarried, which names `who`, and does not begin."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    with _NoCollectives(who):
        yield


Step = Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class Install:
    """What one entry does once the tensors are filled, in order; `name` says which entry it is."""

    name: str
    steps: tuple[Step, ...]


def entry_name(key: str, value: object) -> str:
    """An entry in a message: its key and its class."""
    return f"entry {key!r} ({type(value).__name__})"


def elements(value: object) -> Mapping[str, Any]:
    """The objects of an entry by path: "" for a single one, else by place in a list or key of a dict."""
    if type(value) is dict:
        return {str(key): one for key, one in value.items()}
    if type(value) in (list, tuple):
        return {str(index): one for index, one in enumerate(cast(Sequence[object], value))}
    return {"": value}


def type_name(value: object) -> str:
    """The class of an entry; of several objects their number and classes."""
    if type(value) not in (dict, list, tuple):
        return type(value).__name__
    each = elements(value).values()
    return f"{len(each)} x {', '.join(sorted({type(one).__name__ for one in each}))}"


@contextmanager
def code_of(entry: str, *, doing: str) -> Iterator[None]:
    """What the entry's code raises becomes EntryFailed, which names the entry; errors of this library stay as they are."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise EntryFailed(f"{entry}: {doing} raised {_told(error)}; nothing was changed") from error


def install_all(installs: Sequence[Install]) -> None:
    """Runs all steps. Raises EntryFailed, or the library's own error of a step, saying what had been changed by then."""
    for number, install in enumerate(installs):
        for step in install.steps:
            try:
                step()
            except Exception as error:
                changed = _listed([other.name for other in installs[:number]])
                before = f"changed already: all tensors that were read{changed}, and perhaps a part of this entry"
                after = _listed([other.name for other in installs[number + 1 :]]).removeprefix(", ")
                rest = f"; not reached: {after}" if after else ""
                if isinstance(error, CheckpointError):
                    raise type(error)(f"{error.message}; {before}{rest}", report=error.report) from error
                told = f"{install.name}: loading its state raised {_told(error)}; {before}{rest}"
                raise EntryFailed(told) from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _listed(names: Sequence[str]) -> str:
    return "".join(f", {name}" for name in names)


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


OPTIMIZER_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


_METHODS = ("state_dict", "load_state_dict")


def has_own_way(optimizer: Optimizer) -> bool:
    """Whether an override or a hook takes part in an optimizer's saving or loading."""
    own = vars(optimizer)
    overrides = any(getattr(type(optimizer), name) is not getattr(Optimizer, name) or name in own for name in _METHODS)
    return overrides or any(own.get(hooks) for hooks in OPTIMIZER_HOOKS)


def state_dict_of(item: str, optimizer: Optimizer) -> Any:
    """The optimizer's own state dict. Raises ValueNotCarried for one that communicates."""
    with collectives_refused(f"state_dict of optimizer {item!r} ({type(optimizer).__name__})"), hooks_there(optimizer):
        return optimizer.state_dict()


@contextmanager
def hooks_there(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the optimizer has the dicts for hooks, without which torch's methods fail, though it never called torch's own
    __init__: of a class older than they are.
    """
    added = [name for name in OPTIMIZER_HOOKS if not hasattr(optimizer, name)]
    for name in added:
        setattr(optimizer, name, OrderedDict())
    try:
        yield
    finally:
        for name in added:
            delattr(optimizer, name)
