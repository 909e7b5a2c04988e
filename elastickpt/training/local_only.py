"""State dicts and hooks run as code of one rank: a collective in them would wait for ranks that do not call it too.

Every collective, of c10d or of a DTensor, goes through torch's dispatcher, where it is stopped before it begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elastickpt.errors import ValueNotCarried

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
