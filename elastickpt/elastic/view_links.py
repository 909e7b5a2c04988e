"""What a view has to transfer tensors: sockets between its members, and the default process group, of gloo.

No tensor of ours goes over gloo, whose transfers cannot be ended: one of which a part has arrived, or gone, waits for the rest
for ever when its connection is closed (`Pair::signalException` of its tcp transport tells only those that have not begun). The
group is there for the saves of the view, and for code of the user's that asks for one.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore, distributed_c10d  # type: ignore[attr-defined]

from elastickpt.elastic import environment
from elastickpt.elastic.duties import Exchange
from elastickpt.elastic.limits import FORMING_S
from elastickpt.elastic.links import LinkBroken, Sending
from elastickpt.elastic.mesh import ViewSockets, meet, open_entrance
from elastickpt.ranks.addresses import not_in_forks, own_address
from elastickpt.ranks.messages import decode, encode
from elastickpt.ranks.processes import socket_identity


class _At(msgspec.Struct, frozen=True):
    """Where a member is called, and by which key; `store`: where the store of the view is, of the member that keeps it."""

    key: bytes
    address: str
    store: str


class _ViewStore(Store):
    """The store of a view's group, which the member of stage 0 keeps at `address`. Others call there when they first ask: for
    who is gone nobody waits while the group is made. What is set before is told then."""

    def __init__(self, address: str, kept: TCPStore | None) -> None:
        super().__init__()
        self._address, self._kept, self._untold = address, kept, dict[str, bytes]()
        self._calling = threading.Lock()

    def _there(self) -> TCPStore:
        with self._calling:
            if self._kept is None:
                self._kept = _store_at(self._address, listener=None)
                for key, value in self._untold.items():
                    self._kept.set(key, value)  # type: ignore[arg-type]  # the stub says str; torch gives bytes
            return self._kept

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        if self._kept is None:
            self._untold[key] = bytes(value)
        else:
            self._kept.set(key, value)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        return self._there().get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        if timeout is None:
            self._there().wait(keys)
        else:
            self._there().wait(keys, timeout)

    def check(self, keys: list[str]) -> bool:
        return self._there().check(keys)

    def add(self, key: str, amount: int) -> int:
        return self._there().add(key, amount)

    def clone(self) -> Store:
        """A connection of its own, for another thread."""
        return self._there().clone()  # type: ignore[attr-defined, no-any-return]  # the stub lacks it


class ViewLinks:
    """Links of one view, and the default process group of its members, a gloo group, while they are open. One at a time in a
    process. Nothing of them is needed once a member is gone."""

    def __init__(
        self, exchange: Exchange, *, stage: int, stages: int, limit_s: float, over: Callable[[], bool] = lambda: False
    ) -> None:
        """Makes them, together with all others, which are waited for `limit_s` seconds. Blocking; raises LinkBroken, what
        `exchange` raises, and TaskOver soon after `over` holds."""
        self.stage, self.stages = stage, stages
        self._mesh: ViewSockets | None = None
        self._store: Store | None = None
        exchange.set(f"here/{stage}", socket_identity().encode())
        near = len(set(exchange.get_all([f"here/{one}" for one in range(stages)], limit_s=limit_s))) == 1
        try:
            self._mesh = self._met(exchange, near, over)
            self._make_group("lo" if near else "")
        except (OSError, RuntimeError) as error:
            self.close()
            raise LinkBroken(str(error)) from error
        except BaseException:
            self.close()
            raise

    def _met(self, exchange: Exchange, near: bool, over: Callable[[], bool]) -> ViewSockets:
        door = open_entrance(host=None if near else own_address())
        with door.listener:
            kept = self._keep_store("127.0.0.1" if near else own_address()) if self.stage == 0 else ""
            exchange.set(f"at/{self.stage}", encode(_At(door.key, door.address, kept)))
            told = exchange.get_all([f"at/{one}" for one in range(self.stages)], limit_s=FORMING_S)
            members = [decode(one, _At) for one in told]
            self._store = self._store or _ViewStore(members[0].store, None)
            others = [(one.key, one.address) for one in members]
            return ViewSockets(meet(door, others, self.stage, limit_s=FORMING_S, over=over))

    def _keep_store(self, host: str) -> str:
        """Its address."""
        listener = not_in_forks(socket.create_server((host, 0)))
        address = f"{host}:{listener.getsockname()[1]}"
        self._store = _ViewStore(address, _store_at(address, listener=listener.detach()))
        return address

    def _make_group(self, interface: str) -> None:
        limit, hook = timedelta(seconds=FORMING_S), sys.excepthook  # saves wait so long for late members
        with environment.connects_late(interface):
            dist.init_process_group("gloo", store=self._store, rank=self.stage, world_size=self.stages, timeout=limit)
        sys.excepthook = hook  # torch puts another one around it with each group

    def send(self, tensor: torch.Tensor, stage: int) -> Sending:
        return self._open().send(_bytes_of(tensor.detach().contiguous()), stage)

    def receive(self, tensor: torch.Tensor, stage: int) -> None:
        whole = tensor.detach()
        dense = whole if whole.is_contiguous() else torch.empty(whole.shape, dtype=whole.dtype)
        self._open().receive(_bytes_of(dense), stage)
        if dense is not whole:
            whole.copy_(dense)

    def abort(self) -> None:
        if self._mesh is not None:
            self._mesh.abort()

    def close(self) -> None:
        if self._mesh is not None:
            self._mesh.close()
            self._mesh = None
        if dist.is_initialized():
            dist.destroy_process_group()
        else:  # it was not made; torch counts it all the same, and would look for the next one under another name
            distributed_c10d._world.group_count = 0
        self._store = None

    def _open(self) -> ViewSockets:
        if self._mesh is None:
            raise LinkBroken("these links are closed")
        return self._mesh


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Its content, to be read or written; the tensor is contiguous, and in the memory of this process."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _store_at(address: str, *, listener: int | None) -> TCPStore:
    """`listener`: of the process that keeps it, a socket that listens at no other address."""
    host, _, port = address.rpartition(":")
    return TCPStore(
        host,
        int(port),
        is_master=listener is not None,
        timeout=timedelta(seconds=FORMING_S),
        wait_for_workers=False,
        master_listen_fd=listener,
    )
