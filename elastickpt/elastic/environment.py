"""What the launcher tells the processes that it starts through their environment, and which of their errors it says itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ENDPOINT, TOKEN, UID = "ELASTICKPT_ENDPOINT", "ELASTICKPT_TOKEN", "ELASTICKPT_UID"
HOST, ZONE = "ELASTICKPT_HOST", "ELASTICKPT_ZONE"
TORCHRUN = "TORCHELASTIC_RUN_ID"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


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
def listens(interface: str) -> Iterator[None]:
    """What gloo makes in here listens on this interface only, unless the user has chosen one; "" for as gloo finds it."""
    chosen = GLOO_INTERFACE in os.environ or not interface
    if not chosen:
        os.environ[GLOO_INTERFACE] = interface
    try:
        yield
    finally:
        if not chosen:
            os.environ.pop(GLOO_INTERFACE, None)


_TOLD: list[BaseException] = []


def say_is_told(error: BaseException) -> None:
    """The launcher says this error; its process need not."""
    _TOLD[:] = [error]


def is_told(error: BaseException) -> bool:
    return any(one is error for one in _TOLD)
