"""Member 0 is killed while it tells the others of an attempt: who was told is not kept by who was not. [SAVE-105]"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import elastickpt as ek
from elastickpt.errors import CheckpointError, RankLost
from elastickpt.ranks.hub import Hub
from elastickpt.ranks.messages import Frame, FrameKind
from tools.gloo_ranks import spawn_ranks

pytestmark = pytest.mark.ranks

RANKS, HANGS_S = 4, 30.0  # half of what a committer waits for a member of whom it heard nothing


def saves_twice(rank: int, world_size: int, folder: str, told: tuple[int, ...], executor: str) -> tuple[str, str]:
    """The kind of error and the message by which the second save ended, of whose attempt only those hear that are `told`."""
    state = {"t": torch.arange(9.0)}
    options = ek.AsyncOptions(executor=executor)  # type: ignore[arg-type]
    ek.async_save(state, f"{folder}/first", options=options).result(HANGS_S)
    if rank == 0:
        _tell_only(told)
    handle = ek.async_save(state, f"{folder}/second", options=options)
    try:
        handle.result(HANGS_S)
    except CheckpointError as error:
        return error.kind, str(error)
    return "", "saved"


def _tell_only(told: tuple[int, ...]) -> None:
    send, left = Hub._send, set(told)

    def telling(self: Hub, member: int, frame: Frame) -> None:
        if frame.kind is not FrameKind.VERDICT or member in told:
            send(self, member, frame)
        left.discard(member if frame.kind is FrameKind.VERDICT else -1)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    Hub._send = telling  # type: ignore[method-assign]


OFTEN = (((2,), "process"), ((1, 3), "thread"))


@pytest.mark.parametrize(
    ("told", "executor"),
    [
        pytest.param(told, executor, marks=() if (told, executor) in OFTEN else pytest.mark.long)
        for told in ((1,), (2,), (3,), (1, 2), (1, 3), (2, 3))
        for executor in ("process", "thread")
    ],
)
def test_whoever_was_told_of_an_attempt_is_not_kept_by_whoever_was_not(
    tmp_path: Path, told: tuple[int, ...], executor: str
) -> None:
    with spawn_ranks(saves_twice, RANKS, str(tmp_path), told, executor) as ranks:
        outcomes = ranks.wait()
    assert outcomes[0].status == -signal.SIGKILL
    for one in outcomes[1:]:
        assert one.error is None, one.traceback
        kind, message = one.value
        assert kind == RankLost.kind, message
        assert "rank 0" in message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["first"]
    assert ek.open(tmp_path / "first").verify().problems == ()
