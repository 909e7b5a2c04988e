"""Whether the job that claimed a run last lives: its trainer answers at the address in its claim. [RUN-46..49, RUN-64]

    unix:elastickpt-trainer-<32 hex digits>@<host name>/<boot id>/<network namespace> tcp:<IP address>:<port>

The first word names an abstract socket and where it reaches; the second one is there if other hosts are to ask too. Any other
text is an address at which nobody answers.

    asker    0x01, 32 random bytes, digest("ask", token, those bytes)
    trainer  digest("answer", token, those bytes), and closes; or closes, if it has no token that fits

So the token is never sent, and who does not know it learns nothing. Who answers wrongly, or not within the limit, is gone: a
process that is stopped, or hangs, is fenced by the claim as a dead one is.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import ip_address

from elastickpt.errors import Damaged, RunBusy
from elastickpt.ledger.objects import Operations
from elastickpt.ledger.records import Claim, Claimer
from elastickpt.ledger.stored import list_commits, read_claim
from elastickpt.ranks.processes import process_start, socket_identity
from elastickpt.storage.store import Store

LIMIT_S = 2.0
VERSION = b"\x01"
NONCE_NBYTES = 32
DIGEST_NBYTES = 32
QUESTION_NBYTES = len(VERSION) + NONCE_NBYTES + DIGEST_NBYTES
_ADDRESS = re.compile(
    r"unix:(?P<name>elastickpt-trainer-[0-9a-f]{32})@(?P<host>\S+)(?: tcp:\[?(?P<ip>[0-9a-fA-F.:]+)\]?:(?P<port>[0-9]{1,5}))?"
)


@dataclass(frozen=True, slots=True)
class TrainerAddress:
    """Where a trainer answers: the abstract socket `name`, reached where `socket_identity` is `host`; (IP address, port)."""

    name: str
    host: str
    tcp: tuple[str, int] | None = None

    def __str__(self) -> str:
        unix = f"unix:{self.name}@{self.host}"
        if self.tcp is None:
            return unix
        ip, port = self.tcp
        return f"{unix} tcp:[{ip}]:{port}" if ":" in ip else f"{unix} tcp:{ip}:{port}"


def claimer(address: str, token: str) -> Claimer:
    """This process, now, as it claims a run; "" where nobody answers for the claim."""
    return Claimer(address, token, socket.gethostname(), os.getpid(), process_start(os.getpid()) or 0, time.time())


def parse_address(text: str) -> TrainerAddress | None:
    """What `str(address)` spells; None for any other text."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return None
    tcp = None
    if found["ip"]:
        try:
            tcp = str(ip_address(found["ip"])), int(found["port"])
        except ValueError:
            return None
        if not 0 < tcp[1] < 1 << 16:
            return None
    address = TrainerAddress(found["name"], found["host"], tcp)
    return address if str(address) == text else None


def question(token: str) -> tuple[bytes, bytes]:
    """What an asker sends, and what it accepts as an answer."""
    nonce = secrets.token_bytes(NONCE_NBYTES)
    return VERSION + nonce + _digest(b"ask", token, nonce), _digest(b"answer", token, nonce)


def answer(asked: bytes, tokens: tuple[str, ...]) -> bytes:
    """What a trainer of these tokens answers; nothing to who knows none of them."""
    head, nonce, tag = asked[:1], asked[1 : 1 + NONCE_NBYTES], asked[1 + NONCE_NBYTES :]
    if head != VERSION:
        return b""
    fitting = [token for token in tokens if hmac.compare_digest(_digest(b"ask", token, nonce), tag)]
    return _digest(b"answer", fitting[0], nonce) if fitting else b""


def trainer_answers(claim: Claim, *, limit_s: float = LIMIT_S) -> bool:
    """Whether the trainer that made this claim lives: it proves within `limit_s` that it knows the token. Blocking.

    False for whatever else happens: nobody there, a wrong answer, silence, an address that cannot be read.
    """
    address = parse_address(claim.by.address)
    if address is None:
        return False
    deadline = time.monotonic() + limit_s
    for family, place in _places(address):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as connection:
            if _proves(connection, place, claim.by.token, deadline):
                return True
    return False


def require_no_living_trainer(store: Store, *, answers: Callable[[Claim], bool] = trainer_answers) -> Operations[None]:
    """The job that claimed the run last is gone, or nobody claimed it; else raises RunBusy, naming it. Before a claim.

    Older claims are not asked: the newest has fenced them. A claim that is damaged names nobody who could be asked. Raises
    StorageFailed kinds.
    """
    listing = yield from list_commits(store)
    if not listing.claims:
        return
    try:
        claim = yield from read_claim(store, max(listing.claims))
    except Damaged:
        return
    if answers(claim):
        by = claim.by
        raise RunBusy(
            f"{store.url}: epoch {claim.epoch} is held by a job that lives: process {by.pid} on host {by.host} answers; "
            f"end it, or take the run from it with take_over=True (--take-over)"
        )


def _places(address: TrainerAddress) -> Iterator[tuple[int, str | tuple[str, int]]]:
    if address.host == socket_identity():
        yield socket.AF_UNIX, f"\0{address.name}"
    if address.tcp is not None:
        yield (socket.AF_INET6 if ":" in address.tcp[0] else socket.AF_INET), address.tcp


def _proves(connection: socket.socket, place: str | tuple[str, int], token: str, deadline: float) -> bool:
    """Raises OSError where nobody is, TimeoutError among them."""
    asked, expected = question(token)
    connection.settimeout(_left(deadline))
    connection.connect(place)
    connection.sendall(asked)
    found = b""
    while len(found) < DIGEST_NBYTES:
        connection.settimeout(_left(deadline))
        data = connection.recv(DIGEST_NBYTES - len(found))
        if not data:
            return False
        found += data
    return hmac.compare_digest(found, expected)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _digest(purpose: bytes, token: str, nonce: bytes) -> bytes:
    key = blake2b(token.encode()).digest()
    return blake2b(nonce, key=key, person=purpose, digest_size=DIGEST_NBYTES).digest()
