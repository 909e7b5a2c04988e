"""Universal, crash-safe checkpoints for distributed PyTorch training: save at one layout, load at any other.

import elastickpt as ek

ek.save(state, path)    # blocking; whole or absent
ek.async_save(state, path).result()    # stages and returns; written beside training
ek.load(state, path)    # in place, at whatever layout `state` has now; also RUN, RUN@STEP
ek.open(path)           # read only, without torch; also RUN, RUN@STEP
ek.Run(root, state)     # a job's checkpoints over its whole history
ek.adopt(root)          # have whole checkpoints of a run count whose registers were lost
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from elastickpt.format.version import RELEASE as __version__

if TYPE_CHECKING:
    from elastickpt import elastic as elastic
    from elastickpt import errors as errors
    from elastickpt.ledger.retention import Best as Best
    from elastickpt.ledger.retention import Keep as Keep
    from elastickpt.loading.checkpoint import Checkpoint as Checkpoint
    from elastickpt.loading.session import LoadReport as LoadReport
    from elastickpt.runs.adopting import AdoptReport as AdoptReport
    from elastickpt.runs.adopting import adopt as adopt
    from elastickpt.runs.due import Every as Every
    from elastickpt.runs.due import YoungDaly as YoungDaly
    from elastickpt.runs.loading import load as load
    from elastickpt.runs.opening import open_checkpoint as open
    from elastickpt.runs.options import RunOptions as RunOptions
    from elastickpt.runs.restoring import Restored as Restored
    from elastickpt.runs.run import Run as Run
    from elastickpt.saving.async_save import async_save as async_save
    from elastickpt.saving.request import AsyncOptions as AsyncOptions
    from elastickpt.saving.request import CheckpointInfo as CheckpointInfo
    from elastickpt.saving.save import save as save
    from elastickpt.saving.task import SaveHandle as SaveHandle
    from elastickpt.training.held_trees import PerRank as PerRank
    from elastickpt.training.modules import trainable as trainable
    from elastickpt.training.rng import RNG as RNG


# name → where it lives. Lazy (PEP 562), so that a reader of checkpoints never imports torch.
_PUBLIC = {
    "AdoptReport": ("elastickpt.runs.adopting", "AdoptReport"),
    "AsyncOptions": ("elastickpt.saving.request", "AsyncOptions"),
    "Checkpoint": ("elastickpt.loading.checkpoint", "Checkpoint"),
    "CheckpointInfo": ("elastickpt.saving.request", "CheckpointInfo"),
    "Best": ("elastickpt.ledger.retention", "Best"),
    "Every": ("elastickpt.runs.due", "Every"),
    "Keep": ("elastickpt.ledger.retention", "Keep"),
    "LoadReport": ("elastickpt.loading.session", "LoadReport"),
    "PerRank": ("elastickpt.training.held_trees", "PerRank"),
    "RNG": ("elastickpt.training.rng", "RNG"),
    "Restored": ("elastickpt.runs.restoring", "Restored"),
    "Run": ("elastickpt.runs.run", "Run"),
    "RunOptions": ("elastickpt.runs.options", "RunOptions"),
    "SaveHandle": ("elastickpt.saving.task", "SaveHandle"),
    "YoungDaly": ("elastickpt.runs.due", "YoungDaly"),
    "adopt": ("elastickpt.runs.adopting", "adopt"),
    "async_save": ("elastickpt.saving.async_save", "async_save"),
    "load": ("elastickpt.runs.loading", "load"),
    "open": ("elastickpt.runs.opening", "open_checkpoint"),
    "save": ("elastickpt.saving.save", "save"),
    "trainable": ("elastickpt.training.modules", "trainable"),
}

__all__ = [
    "RNG",
    "AdoptReport",
    "AsyncOptions",
    "Best",
    "Checkpoint",
    "CheckpointInfo",
    "Every",
    "Keep",
    "LoadReport",
    "PerRank",
    "Restored",
    "Run",
    "RunOptions",
    "SaveHandle",
    "YoungDaly",
    "__version__",
    "adopt",
    "async_save",
    "elastic",
    "errors",
    "load",
    "open",
    "save",
    "trainable",
]


def __getattr__(name: str) -> object:
    if name in ("elastic", "errors"):
        return import_module(f"elastickpt.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'elastickpt' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value  # the next access is a plain lookup
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
