"""Optimizers of other libraries, each with its defaults, on a small model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

import elastickpt as ek
from tools.clients.case import Case, Job, Life, looped, model, states_of, train, wrapped

Make = Callable[[Any], Any]


def _script(make: Make) -> Callable[[Life], object]:
    def job(processes: int) -> Job:
        net = wrapped(model(), processes)
        optimizer = make(net)
        return Job(
            {"model": net, "optimizer": optimizer, "rng": ek.RNG()},
            train(net, optimizer),
            lambda: (dict(net.state_dict()), states_of(optimizer)),
        )

    return looped(job)


def _by_class(cls: Any, **options: Any) -> Make:
    return lambda net: cls(net.parameters(), **options)


def _classes(module: str) -> Iterator[tuple[str, Any]]:
    """The optimizers that a library exports and that take parameters and a rate alone."""
    found = importlib.import_module(module)
    for name in sorted(vars(found)):
        cls = vars(found)[name]
        if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)) or name.startswith("_"):
            continue
        needed = [
            one.name
            for one in inspect.signature(cls.__init__).parameters.values()
            if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) and one.name != "self"
        ]
        if len(needed) <= 1:
            yield name, cls


LIBRARIES = {
    "torch": "torch.optim",
    "pytorch-optimizer": "pytorch_optimizer",
    "torch-optimizer": "torch_optimizer",
    "schedulefree": "schedulefree",
    "bitsandbytes": "bitsandbytes.optim",
    "torchao": "torchao.optim",
}


def cases(library: str) -> Iterator[Case]:
    """Those of one of LIBRARIES; none of another one."""
    if module := LIBRARIES.get(library):
        for name, cls in _classes(module):
            if cls is torch.optim.Optimizer or (library != "torch" and cls.__module__.startswith("torch.optim")):
                continue
            several = (1, 2) if name in ("AdamW", "AdamWScheduleFree", "Lamb", "SOAP", "AdamW8bit", "Muon") else (1,)
            yield Case(library, name, _script(_by_class(cls)), several)
