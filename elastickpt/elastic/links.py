"""The groups over which members of one view send each other tensors: made, ended from another thread, made anew.

Gloo has no abort. But a wait that times out closes every pair of its context, and every member that is connected with this one
sees a closed connection: a receive that nothing can match, waited on for a millisecond from another thread, ends whatever this
process waits for. The reverse of the coin: nothing may wait for a short time on a group that is to go on, so every wait names
its limit here, and the group's own limit is only for the making of its connections.
"""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore, distributed_c10d  # type: ignore[attr-defined]

from elastickpt.elastic import environment
from elastickpt.elastic.duties import Exchange, TaskOver
from elastickpt.errors import DeadlineExceeded
from elastickpt.ranks.addresses import not_in_forks, own_address
from elastickpt.ranks.processes import socket_identity

FORM_LIMIT_S = 10.0
"""For how long the connections of one group may take: a member that died since it said where it is reached."""

_NEVER = timedelta(days=7)  # an interrupt ends a wait, not a clock: how long a step takes is the user's affair
_GLOO_TIMES = 5  # for so many of a group's limits gloo waits for one connection
_POISON_TAG = 2**31 - 1
_POISON_WAIT = timedelta(milliseconds=1)


class LinkBroken(Exception):
    """What was sent or waited for did not come about: a member is gone, or this group was ended."""


class Sending(Protocol):
    def wait(self) -> None:
        """Until the tensor may change again. Raises LinkBroken."""
        ...


class Links(Protocol):
    """Between the members of one view; a member is known by its stage. Re-formation makes new ones."""

    stage: int
    stages: int

    def send(self, tensor: torch.Tensor, stage: int) -> Sending:
        """Not blocking; the tensor must not change before the wait is over."""
        ...

    def receive(self, tensor: torch.Tensor, stage: int) -> None:
        """Fills `tensor` with what was sent, in order. Blocking without a limit; raises LinkBroken."""
        ...

    def abort(self) -> None:
        """Ends what any thread waits for here, and everything that is asked for from now on. From any thread; quick."""
        ...

    def close(self) -> None:
        """Frees what the links hold. By the thread that uses them."""
        ...


def told_by_all(links: Links, mine: torch.Tensor) -> list[torch.Tensor]:
    """What every member says, by stage: tensors of one shape and type. Blocking; raises LinkBroken."""
    others = [stage for stage in range(links.stages) if stage != links.stage]
    sendings = [links.send(mine, stage) for stage in others]
    told = [mine if stage == links.stage else torch.empty_like(mine) for stage in range(links.stages)]
    for stage in others:
        links.receive(told[stage], stage)
    for sending in sendings:
        sending.wait()
    return told


def told_by_one(links: Links, tensor: torch.Tensor, stage: int) -> torch.Tensor:
    """What the member of `stage` says in `tensor`, which elsewhere is filled. Blocking; raises LinkBroken."""
    if links.stage == stage:
        for sending in [links.send(tensor, other) for other in range(links.stages) if other != stage]:
            sending.wait()
    else:
        links.receive(tensor, stage)
    return tensor


class _Gone:
    """Nothing was to be sent."""

    def wait(self) -> None:
        """At once."""


class _GlooSending:
    def __init__(self, work: dist.Work, tensor: torch.Tensor) -> None:
        self._work, self._tensor = work, tensor  # the bytes have to stay where they are

    def wait(self) -> None:
        try:
            self._work.wait(_NEVER)
        except RuntimeError as error:
            raise LinkBroken(str(error)) from error


class _ViewStore(Store):
    """The store of a view's group. While the group is made members tell each other by the exchange, whose waits end with the
    view, however long a member is awaited that has died; from then on it is the one that the member of stage 0 keeps."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange
        self.kept: TCPStore | None = None

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # the stub says str; torch gives bytes
        if self.kept is None:
            self._exchange.set(f"group/{key}", bytes(value))
        else:
            self.kept.set(key, value)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        return self._told([key])[0] if self.kept is None else self.kept.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        if self.kept is None:
            self._told(keys)
        elif timeout is None:
            self.kept.wait(keys)
        else:
            self.kept.wait(keys, timeout)

    def check(self, keys: list[str]) -> bool:
        return self.kept is not None and self.kept.check(keys)

    def add(self, key: str, amount: int) -> int:
        assert self.kept is not None, "nobody counts while a group is made"
        return self.kept.add(key, amount)

    def clone(self) -> Store:
        """A connection of its own, for another thread."""
        assert self.kept is not None, "nobody has threads while a group is made"
        return self.kept.clone()  # type: ignore[attr-defined, no-any-return]  # the stub lacks it

    def _told(self, keys: list[str]) -> list[bytes]:
        try:
            return self._exchange.get_all([f"group/{key}" for key in keys], limit_s=FORM_LIMIT_S)
        except (TaskOver, DeadlineExceeded) as error:
            raise RuntimeError(str(error)) from error  # which torch lets through


class GlooLinks:
    """Links over the default process group, which is a gloo group while they are open. One at a time in a process.

    Its store is kept by the member of stage 0 for one view only, so that nothing of it is needed once a member is gone.
    """

    def __init__(self, exchange: Exchange, *, stage: int, stages: int, limit_s: float) -> None:
        """Makes the group, together with all others, which are waited for `limit_s` seconds. Blocking; raises LinkBroken, and
        what `exchange` raises."""
        self.stage, self.stages = stage, stages
        self._aborting = threading.Lock()
        self._aborted = False
        exchange.set(f"here/{stage}", socket_identity().encode())
        hosts = set(exchange.get_all([f"here/{one}" for one in range(stages)], limit_s=limit_s))
        self._store: Store | None = None
        try:
            address, interface = ("127.0.0.1", "lo") if len(hosts) == 1 else (own_address(), "")
            self._store = store = _ViewStore(exchange)
            limit, hook = timedelta(seconds=FORM_LIMIT_S / _GLOO_TIMES), sys.excepthook
            with environment.listens(interface):
                dist.init_process_group("gloo", store=store, rank=stage, world_size=stages, timeout=limit)
            sys.excepthook = hook  # torch puts another one around it with each group
            made = distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
            made.options._timeout = timedelta(seconds=FORM_LIMIT_S)  # by which saves wait for late members
            store.kept = self._met(exchange, address)
        except RuntimeError as error:
            self.close()
            raise LinkBroken(str(error)) from error
        except BaseException:  # the view ended when the group stood and its store did not: the next one is of another view
            self.close()
            raise

    def _met(self, exchange: Exchange, host: str) -> TCPStore:
        if self.stage == 0:
            listener = not_in_forks(socket.create_server((host, 0)))
            port = listener.getsockname()[1]
            store = _store_at(host, port, listener=listener.detach())
            exchange.set("store", f"{host}:{port}".encode())
            return store
        host, _, number = exchange.get("store", limit_s=FORM_LIMIT_S).decode().rpartition(":")
        return _store_at(host, int(number), listener=None)

    def send(self, tensor: torch.Tensor, stage: int) -> Sending:
        if tensor.numel() == 0:
            return _Gone()
        try:
            flat = tensor.detach().contiguous()
            work = dist.isend(flat, stage)
        except RuntimeError as error:
            raise LinkBroken(str(error)) from error
        assert work is not None
        return _GlooSending(work, flat)

    def receive(self, tensor: torch.Tensor, stage: int) -> None:
        if tensor.numel() == 0:
            return
        try:
            work = dist.irecv(tensor, stage)
            assert work is not None
            work.wait(_NEVER)
        except RuntimeError as error:
            raise LinkBroken(str(error)) from error

    def abort(self) -> None:
        with self._aborting:
            if self._aborted:
                return
            self._aborted = True
            for peer in range(self.stages):
                if peer != self.stage:  # a pair that is closed already raises, and closes no other one: so each is asked
                    with suppress(RuntimeError, ValueError):
                        work = dist.irecv(torch.zeros(1), peer, tag=_POISON_TAG)
                        if work is not None:
                            work.wait(_POISON_WAIT)

    def close(self) -> None:
        with self._aborting:
            self._aborted = True
            if dist.is_initialized():
                dist.destroy_process_group()
            else:  # it was not made; torch counts it all the same, and would look for the next one under another name
                distributed_c10d._world.group_count = 0
            self._store = None


def _store_at(host: str, port: int, *, listener: int | None) -> TCPStore:
    """`listener`: of the process that keeps it, a socket that listens at no other address."""
    return TCPStore(
        host,
        port,
        is_master=listener is not None,
        timeout=timedelta(seconds=FORM_LIMIT_S),
        wait_for_workers=False,
        master_listen_fd=listener,
    )
