"""Autograd's versions of tensors: what was filled behind its back must count as changed.

A forward that ran before a load saved tensors for its backward. Their contents are others now, so that backward must fail,
as it does after `load_state_dict`, and not compute wrong gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd.graph import increment_version


def mark_changed(tensors: Iterable[torch.Tensor]) -> None:
    """Tells autograd that the contents of these tensors changed; a view tells it of its base too."""
    for tensor in tensors:
        if not tensor.is_inference():  # such a tensor has no version, and no graph may keep it
            increment_version(tensor)
