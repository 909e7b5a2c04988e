"""The same staging from a CUDA device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastickpt.training.device import DeviceStaging
from elastickpt.writer.arena import Arena

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_device_tensors_reach_the_arena_as_they_were_when_the_copies_began() -> None:
    device = torch.device("cuda")
    tensor = torch.arange(1 << 20, dtype=torch.float32, device=device).reshape(1024, 1024)
    arena = Arena.create(4 << 20)
    staging = DeviceStaging(arena.memory, device)
    expected = tensor.t().contiguous().cpu().numpy().view(np.uint8).reshape(-1)
    staging.begin()
    staging.copy(tensor.t(), 0, arena.memory[: 3 << 20])
    staging.copy(tensor.t(), 3 << 20, arena.memory[3 << 20 :])
    staging.end()
    staging.order_before([torch.cuda.current_stream()])
    tensor.zero_()
    staging.wait()
    assert np.array_equal(arena.memory, expected)
    staging.close()
    arena.close()
