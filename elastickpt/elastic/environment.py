"""What the launcher tells the processes that it starts through their environment, and which of their errors it says itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ENDPOINT, TOKEN, UID = "ELASTICKPT_ENDPOINT", "ELASTICKPT_TOKEN", "ELASTICKPT_UID"
HOST, ZONE = "ELASTICKPT_HOST", "ELASTICKPT_ZONE"
TORCHRUN = "TORCHELASTIC_RUN_ID"
GLOO_INTERFACE, GLOO_CONNECTS_LATE = "GLOO_SOCKET_IFNAME", "TORCH_GLOO_LAZY_INIT"


@dataclass(frozen=True, slots=True)
class Told:
    """`endpoint`: where the coordinator listens, "" for nowhere. `uid`: as which worker of a launcher this process was
    started, "" for none."""

    endpoint: str
    token: str
    uid: str
    host: str
    zone: str
    torchrun: bool

    def variables(self) -> dict[str, str]:
        return {ENDPOINT: self.endpoint, TOKEN: self.token, UID: self.uid, HOST: self.host, ZONE: self.zone}


def told() -> Told:
    """What this process was told."""
    of = os.environ
    endpoint, token, uid, host, zone = (of.get(name, "") for name in (ENDPOINT, TOKEN, UID, HOST, ZONE))
    return Told(endpoint, token, uid, host, zone, torchrun=TORCHRUN in of)


def tell(variables: dict[str, str]) -> None:
    """This process, and those that it starts, are told this."""
    os.environ.update(variables)


def of_children(**defaults: str) -> dict[str, str]:
    """This process's environment, for a process that it starts; `defaults` where a variable is not set."""
    return {**defaults, **os.environ}


@contextmanager
def connects_late(interface: str) -> Iterator[None]:
    """A gloo group that is made in here connects two members when they first have something for each other, and listens on this
    interface only; "" for as gloo finds it. What the user has chosen holds."""
    ours = {GLOO_CONNECTS_LATE: "1"} | ({GLOO_INTERFACE: interface} if interface else {})
    put = [name for name in ours if name not in os.environ]
    os.environ.update({name: ours[name] for name in put})
    try:
        yield
    finally:
        for name in put:
            del os.environ[name]


_TOLD: list[BaseException] = []


def say_is_told(error: BaseException) -> None:
    """The launcher says this error; its process need not."""
    _TOLD[:] = [error]


def is_told(error: BaseException) -> bool:
    return any(one is error for one in _TOLD)
