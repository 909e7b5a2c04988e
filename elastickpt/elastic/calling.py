"""A connection to a coordinator, on which both ends have proved that they know the token of the job."""

from __future__ import annotations

import selectors
import time

from elastickpt.elastic.limits import AGAIN_S, HELLO_S
from elastickpt.elastic.stream import Closed, Stream, called
from elastickpt.errors import RecoveryFailed
from elastickpt.ranks.addresses import dial, not_in_forks


def connected(endpoint: str, token: str, *, wait_s: float = 0.0) -> Stream:
    """A connection to who listens at `endpoint` and has proved to know the token. Where nobody listens yet, that is waited
    for at most `wait_s` seconds. Blocking. Raises RecoveryFailed."""
    until = time.monotonic() + wait_s
    while True:
        try:
            stream = Stream(not_in_forks(dial(endpoint, timeout_s=HELLO_S)))
            break
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) or time.monotonic() >= until:
                raise _not_found(endpoint, str(error)) from error
        time.sleep(AGAIN_S)
    try:
        mine, expected = called(_awaited(stream, endpoint), token)
        stream.send(mine)
        if _awaited(stream, endpoint) != expected:
            raise _not_found(endpoint, "who listens there does not know the token of this job")
    except BaseException:
        stream.close()
        raise
    return stream


def _awaited(stream: Stream, endpoint: str) -> bytes:
    until = time.monotonic() + HELLO_S
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0:
            if selector.select(left):
                try:
                    found = stream.receive_one()
                except Closed:
                    raise _not_found(endpoint, "it closed the connection: is $ELASTICKPT_TOKEN that of the job?") from None
                if found is not None:
                    return found
    raise _not_found(endpoint, f"nothing was heard within {HELLO_S:g} s")


def _not_found(endpoint: str, why: str) -> RecoveryFailed:
    text = f"coordinator-lost: no coordinator of this job at {endpoint}: {why}"
    return RecoveryFailed(text, reason="coordinator-lost", code=75)
