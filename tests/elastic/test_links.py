"""Where the groups of a view listen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from elastickpt.elastic.duties import TaskOver
from elastickpt.elastic.view_links import ViewLinks
from elastickpt.errors import DeadlineExceeded
from elastickpt.ranks.processes import socket_identity
from tests.elastic.files_exchange import FilesExchange


@pytest.mark.parametrize(("chosen", "expected"), [(None, "lo"), ("eth7", "eth7")])
def test_on_one_machine_nothing_listens_beyond_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: str
) -> None:
    """Gloo by itself would listen where the name of the host leads. [REC-21]"""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if chosen is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
    begun = dist.init_process_group
    seen: list[str | None] = []

    def init(*args: object, **options: object) -> None:
        seen.append(os.environ.get("GLOO_SOCKET_IFNAME"))
        with monkeypatch.context() as here:
            here.setenv("GLOO_SOCKET_IFNAME", "lo")
            begun(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(dist, "init_process_group", init)
    links = ViewLinks(FilesExchange(str(tmp_path)), stage=0, stages=1, limit_s=60.0)
    listening = [one.laddr.ip for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN]
    links.close()
    assert seen == [expected]
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


class Superseded:
    """What members of a view tell each other, of whom the second one dies before it says its address: the view is over."""

    def __init__(self) -> None:
        self.told = {f"here/{stage}": socket_identity().encode() for stage in range(2)}

    def set(self, key: str, value: bytes) -> None:
        self.told[key] = value

    def get(self, key: str, *, limit_s: float) -> bytes:
        return self.get_all([key], limit_s=limit_s)[0]

    def get_all(self, keys: Sequence[str], *, limit_s: float) -> list[bytes]:
        if not self.told.keys() >= set(keys):
            raise TaskOver("generation 1 is over")
        return [self.told[key] for key in keys]


def test_a_group_that_is_being_made_ends_with_its_view() -> None:
    """No limit has to pass, though a member that died is awaited. [REC-11]"""
    with pytest.raises(TaskOver, match="generation 1 is over"):
        ViewLinks(Superseded(), stage=0, stages=2, limit_s=60.0)
    assert not dist.is_initialized()


class EndsBehindTheStore(FilesExchange):
    """The view is over, or a member late, when its store stands and nobody was told of it yet."""

    error: Exception

    def set(self, key: str, value: bytes) -> None:
        if key == "at/0":
            raise self.error
        super().set(key, value)


@pytest.mark.parametrize("error", [TaskOver("generation 1 is over"), DeadlineExceeded("nobody tells of the store")])
def test_a_store_that_stands_ends_with_its_view(tmp_path: Path, error: Exception) -> None:
    """The next view makes one of its own in this process. [REC-11]"""
    ends = EndsBehindTheStore(str(tmp_path / "1"))
    ends.error = error
    with pytest.raises(type(error)):
        ViewLinks(ends, stage=0, stages=1, limit_s=60.0)
    assert not dist.is_initialized()
    ViewLinks(FilesExchange(str(tmp_path / "2")), stage=0, stages=1, limit_s=60.0).close()
