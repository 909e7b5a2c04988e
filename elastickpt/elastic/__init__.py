"""Training that outlives its workers: how a lost pipeline stage is rebuilt, and by whom it is decided.

import elastickpt as ek

ek.elastic.checkfree.alpha(before, after)    # the weights of two neighbours, and what they make of a stage between them
ek.elastic.load_alone(state, path)           # by one rank of a job, while the others go on
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastickpt.elastic import checkfree as checkfree
    from elastickpt.elastic.joining import Job as Job
    from elastickpt.elastic.joining import join as join
    from elastickpt.elastic.policy import Policy as Policy
    from elastickpt.elastic.policy import Report as Report
    from elastickpt.elastic.recovery import Recovery as Recovery
    from elastickpt.elastic.stages import Place as Place
    from elastickpt.elastic.stages import Stage as Stage
    from elastickpt.elastic.trainer import PipelineTrainer as PipelineTrainer
    from elastickpt.runs.loading import load_alone as load_alone

# name → (module, attribute; "" for the module itself). Lazy (PEP 562): who reads checkpoints imports no torch.
_PUBLIC = {
    "Job": ("elastickpt.elastic.joining", "Job"),
    "PipelineTrainer": ("elastickpt.elastic.trainer", "PipelineTrainer"),
    "Place": ("elastickpt.elastic.stages", "Place"),
    "Policy": ("elastickpt.elastic.policy", "Policy"),
    "Recovery": ("elastickpt.elastic.recovery", "Recovery"),
    "Report": ("elastickpt.elastic.policy", "Report"),
    "Stage": ("elastickpt.elastic.stages", "Stage"),
    "checkfree": ("elastickpt.elastic.checkfree", ""),
    "join": ("elastickpt.elastic.joining", "join"),
    "load_alone": ("elastickpt.runs.loading", "load_alone"),
}

__all__ = ["Job", "PipelineTrainer", "Place", "Policy", "Recovery", "Report", "Stage", "checkfree", "join", "load_alone"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'elastickpt.elastic' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    found: object = import_module(module)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
