"""Where processes of a job are told to meet."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest

from elastickpt.ranks import addresses
from elastickpt.ranks.addresses import dial, listen, own_address

FAR = "198.51.100.7"


def interface(address: str, *, up: bool = True) -> tuple[dict[str, object], dict[str, object]]:
    return {"eth7": SimpleNamespace(isup=up)}, {"eth7": [SimpleNamespace(family=socket.AF_INET, address=address)]}


@pytest.mark.parametrize(
    ("routed", "named", "up", "expected"),
    [
        ("127.0.0.1", "127.0.1.1", True, FAR),  # a host that knows its own name as a loopback address
        ("127.0.0.1", FAR, False, FAR),
        (FAR, "127.0.1.1", False, FAR),
        ("127.0.0.1", "198.51.100.8", True, FAR),  # what the name service says is another network's
        ("127.0.0.1", "127.0.1.1", False, "127.0.0.1"),  # nothing else is there
    ],
)
def test_other_hosts_are_told_a_loopback_address_only_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch, routed: str, named: str, up: bool, expected: str
) -> None:
    stats, found = interface(FAR, up=up)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: stats)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(addresses.socket, "gethostbyname", lambda name: named)

    class Routed(socket.socket):
        def connect(self, address: object) -> None:
            assert address == (addresses._FAR_AWAY, 9)

        def bind(self, address: object) -> None:
            if address != (FAR, 0):
                raise OSError("not an address of this host")

        def getsockname(self) -> tuple[str, int]:
            return routed, 0

    monkeypatch.setattr(addresses.socket, "socket", Routed)
    assert own_address() == expected


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_who_listens_is_reached_at_the_address_told(host: str | None) -> None:
    listener, address = listen(host=host)
    with listener, dial(address, timeout_s=5.0) as caller:
        heard, _ = listener.accept()
        with heard:
            caller.sendall(b"hello")
            assert heard.recv(5) == b"hello"
