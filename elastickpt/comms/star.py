"""A team over sockets: member 0 is the hub, every other member has one connection to it.

Addresses are exchanged once through the job's store. Members on one host meet on an abstract Unix socket, others by TCP;
a hello carries a secret from the store, so that nobody else can join. [SAVE-65]
"""

from __future__ import annotations

import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import msgpack

from elastickpt.comms.addresses import dial, listen, own_address
from elastickpt.comms.frames import Connection, Frame, Kind, PeerGone, PeerSilent
from elastickpt.comms.hosts import host_identity
from elastickpt.comms.team import BEAT_S, Contribute, Decide, failure_of
from elastickpt.errors import (
    CheckpointError,
    DeadlineExceeded,
    RankFailure,
    RankLost,
    RanksFailed,
    from_report,
)

RETRY_S = 0.05


class KeyValue(Protocol):
    """The job's store: what a rank sets, every rank gets."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Blocks until the key is set. Raises DeadlineExceeded naming it."""
        ...


def _encode_report(report: Sequence[RankFailure]) -> bytes:
    return bytes(msgpack.packb([(f.rank, f.kind, f.message) for f in report]))


def _decode_report(data: bytes) -> tuple[RankFailure, ...]:
    return tuple(RankFailure(rank, kind, message) for rank, kind, message in msgpack.unpackb(data))


class Star:
    """One member's end of the star; see `team.Team`."""

    def __init__(
        self,
        member: int,
        ranks: tuple[int, ...],
        hosts: tuple[str, ...],
        peers: dict[int, Connection],
        *,
        silence_s: float,
    ) -> None:
        self._member = member
        self._ranks = ranks
        self._hosts = hosts
        self._peers = peers  # the hub: every other member; a member: only the hub
        self._silence_s = silence_s
        self._round = 0
        self._working = threading.Event()
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="elastickpt-beat", daemon=True).start()

    @property
    def member(self) -> int:
        return self._member

    @property
    def ranks(self) -> tuple[int, ...]:
        return self._ranks

    @property
    def hosts(self) -> tuple[str, ...]:
        return self._hosts

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Ends this member's part; its peers see a closed connection. Not blocking."""
        self._closed.set()
        for peer in self._peers.values():
            peer.close()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            if self._working.is_set():
                for peer in list(self._peers.values()):
                    peer.beat(self._round)

    def round(self, name: str, contribute: Contribute, decide: Decide) -> bytes:
        if self.closed:
            raise RanksFailed(f"round {name!r}: an earlier failure ended this group's connections")
        self._round += 1
        self._working.set()
        cause: BaseException | None = None
        mine: bytes | RankFailure
        try:
            try:
                mine = contribute()
            except Exception as error:
                mine, cause = failure_of(error, self._ranks[self._member]), error
            reply, report = self._lead(name, mine, decide) if self._member == 0 else self._follow(name, mine)
        except BaseException:  # KeyboardInterrupt and the like: peers must see it now, not at the limit
            self.close()
            raise
        finally:
            self._working.clear()
        if report:
            if any(failure.kind in (RankLost.kind, DeadlineExceeded.kind) for failure in report):
                self.close()
            raise from_report(report) from cause
        return reply

    # -- the hub -------------------------------------------------------------------------------------------------------

    def _lead(self, name: str, mine: bytes | RankFailure, decide: Decide) -> tuple[bytes, tuple[RankFailure, ...]]:
        payloads, failures = self._collect(name, mine)
        replies: Sequence[bytes] = ()
        if not failures:
            try:
                replies = decide([payloads[member] for member in range(len(self._ranks))])
            except Exception as error:
                failures = {0: failure_of(error, self._ranks[0])}
        report = tuple(sorted(failures.values()))
        for member, peer in self._peers.items():
            frame = (
                Frame(Kind.REPORT, self._round, _encode_report(report))
                if report
                else Frame(Kind.VERDICT, self._round, replies[member])
            )
            try:
                peer.send(frame, silence_s=self._silence_s)
            except PeerGone:
                pass  # a member that is gone now learns nothing, and spoils nothing: the decision is made
            except PeerSilent:
                peer.end()  # nor does one that hangs; it may have got half a frame, and finds the connection closed
        return (replies[0] if replies else b""), report

    def _collect(self, name: str, mine: bytes | RankFailure) -> tuple[dict[int, bytes], dict[int, RankFailure]]:
        payloads: dict[int, bytes] = {}
        failures: dict[int, RankFailure] = {}
        if isinstance(mine, bytes):
            payloads[0] = mine
        else:
            failures[0] = mine
        waiting = dict(self._peers)
        begun = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for member, peer in waiting.items():
                selector.register(peer, selectors.EVENT_READ, member)
            while True:
                for member, peer in list(waiting.items()):
                    frame = peer.take()
                    if frame is not None and frame.kind is Kind.PAYLOAD:
                        payloads[member] = frame.data
                        failures.pop(member, None)  # it said what it had to say before it went
                    elif frame is not None and frame.kind is Kind.FAILURE:
                        (failures[member],) = _decode_report(frame.data)
                    if member in payloads or member in failures:
                        selector.unregister(waiting.pop(member))
                if not waiting:
                    return payloads, failures
                for key, _ in selector.select(timeout=BEAT_S):
                    try:
                        waiting[key.data].pump()
                    except PeerGone:
                        failures[key.data] = self._lost(key.data, name)
                now = time.monotonic()
                for member, peer in list(waiting.items()):
                    # a peer may have said nothing while this process itself was busy: count from when we began to listen
                    if member not in failures and now - max(peer.heard_at, begun) > self._silence_s:
                        failures[member] = self._silent(member, name)

    def _lost(self, member: int, name: str) -> RankFailure:
        return RankFailure(self._ranks[member], RankLost.kind, f"its process is gone, or gave up; noticed in round {name!r}")

    def _silent(self, member: int, name: str) -> RankFailure:
        rank = self._ranks[member]
        text = f"did not answer in round {name!r} and sent nothing for {self._silence_s:g} s"
        return RankFailure(rank, DeadlineExceeded.kind, text)

    # -- everybody else ------------------------------------------------------------------------------------------------

    def _follow(self, name: str, mine: bytes | RankFailure) -> tuple[bytes, tuple[RankFailure, ...]]:
        hub = self._peers[0]
        try:
            if isinstance(mine, bytes):
                hub.send(Frame(Kind.PAYLOAD, self._round, mine), silence_s=self._silence_s)
            else:
                hub.send(Frame(Kind.FAILURE, self._round, _encode_report([mine])), silence_s=self._silence_s)
            frame = self._await_hub(hub)
        except PeerGone:
            hub.hear_out()  # a member that hung for too long finds out here: the report names it, and the hub has hung up
            said = hub.take()
            if said is None or said.kind is not Kind.REPORT:
                own = (mine,) if isinstance(mine, RankFailure) else ()
                return b"", (*own, self._lost(0, name))
            frame = said
        except PeerSilent:
            own = (mine,) if isinstance(mine, RankFailure) else ()
            return b"", (*own, self._silent(0, name))
        if frame.kind is Kind.REPORT:
            return b"", _decode_report(frame.data)
        return frame.data, ()

    def _await_hub(self, hub: Connection) -> Frame:
        hub.heard_at = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(hub, selectors.EVENT_READ)
            while True:
                if (frame := hub.take()) is not None:
                    return frame
                if selector.select(timeout=BEAT_S):
                    hub.pump()
                elif time.monotonic() - hub.heard_at > self._silence_s:
                    raise PeerSilent


# -- meeting -----------------------------------------------------------------------------------------------------------


def connect(store: KeyValue, member: int, ranks: tuple[int, ...], *, timeout_s: float = 120.0, silence_s: float = 30.0) -> Star:
    """Meets the other members of a group through the job's store; blocking. Every member must call it.

    `ranks` are the job's ranks by member. Raises DeadlineExceeded naming who did not come within `timeout_s`.
    """
    host = host_identity()
    store.set(f"host/{member}", host.encode())
    if member == 0:
        hosts = tuple(store.get(f"host/{m}", timeout_s=timeout_s).decode() for m in range(len(ranks)))
        peers = _gather_members(store, hosts, ranks, timeout_s)
    else:
        peers = {0: _join_hub(store, member, timeout_s)}
        hosts = tuple(msgpack.unpackb(store.get("hosts", timeout_s=timeout_s)))
    return Star(member, ranks, hosts, peers, silence_s=silence_s)


def _gather_members(store: KeyValue, hosts: tuple[str, ...], ranks: tuple[int, ...], timeout_s: float) -> dict[int, Connection]:
    secret = secrets.token_bytes(16)
    one_host = len(set(hosts)) == 1
    host = None if one_host else own_address()
    listener, address = listen(host=host, backlog=len(ranks))
    peers: dict[int, Connection] = {}
    deadline = time.monotonic() + timeout_s
    with listener:
        store.set("hosts", bytes(msgpack.packb(list(hosts))))
        store.set("hub", bytes(msgpack.packb([address, secret])))
        while len(peers) < len(ranks) - 1:
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, len(ranks))) - set(peers))
                raise DeadlineExceeded(
                    f"ranks {[ranks[m] for m in missing]} did not connect to rank {ranks[0]} within {timeout_s:g} s"
                ) from None
            connection = Connection(sock)
            member = _greeted(connection, sock, secret, deadline)
            if member is None or member in peers or not 0 < member < len(ranks):
                connection.close()
            else:
                peers[member] = connection
    return peers


def _greeted(connection: Connection, sock: socket.socket, secret: bytes, deadline: float) -> int | None:
    """The member that says hello with the right secret; None for anybody else."""
    sock.settimeout(max(0.001, min(10.0, deadline - time.monotonic())))
    try:
        while (hello := connection.take()) is None:
            connection.pump()
        said, member = msgpack.unpackb(hello.data)
    except (PeerGone, ValueError, CheckpointError):
        return None
    sock.settimeout(None)
    return int(member) if secrets.compare_digest(said, secret) else None


def _join_hub(store: KeyValue, member: int, timeout_s: float) -> Connection:
    deadline = time.monotonic() + timeout_s
    while True:
        address, secret = msgpack.unpackb(store.get("hub", timeout_s=timeout_s))
        try:
            sock = dial(address, timeout_s=timeout_s)
        except OSError as error:
            # the address may be that of an earlier life of this job, which the hub is about to overwrite
            if time.monotonic() > deadline:
                raise RankLost(f"member 0 of the group does not accept connections ({error})") from error
            time.sleep(RETRY_S)
            continue
        connection = Connection(sock)
        try:
            connection.send(Frame(Kind.HELLO, 0, bytes(msgpack.packb([secret, member]))), silence_s=timeout_s)
        except (PeerGone, PeerSilent) as gone:
            raise RankLost(f"member 0 of the group closed the connection at once ({gone})") from gone
        return connection
