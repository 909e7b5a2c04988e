"""What ends long work, and only that."""

from __future__ import annotations

import os
import signal

import pytest

from tools.interrupts import sigterm_interrupts


def test_sigterm_interrupts_within_and_is_handled_as_before_afterwards() -> None:
    handled: list[int] = []
    first = signal.signal(signal.SIGTERM, lambda number, _: handled.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, first)
    assert handled == [signal.SIGTERM]
