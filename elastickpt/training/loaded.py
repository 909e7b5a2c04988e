"""Parts of torch that matter only once their module has been imported by somebody else.

An object cannot be an instance of a class whose module was never imported, so asking here costs nothing, while
importing `torch._dynamo` or `torch.distributed.tensor` only to say "no" would cost seconds at every start.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def loaded_module(name: str) -> ModuleType | None:
    """The module `name` if it has been imported in this process, else None."""
    return sys.modules.get(name)


def loaded_type(module: str, name: str) -> type[Any] | None:
    """The class `name` of `module` if that module has been imported in this process, else None."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def is_loaded_instance(value: object, module: str, name: str) -> bool:
    """Whether `value` is an instance of the class `name` of `module`; false when that module was never imported."""
    cls = loaded_type(module, name)
    return cls is not None and isinstance(value, cls)
