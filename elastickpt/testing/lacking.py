"""What the suites demand of a store that declares that it cannot do something."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastickpt.errors import CapabilityMissing
from elastickpt.storage.store import Store


def lacks(store: Store, *, capability: str, operation: Callable[[], object]) -> bool:
    """Whether the store lacks the capability; if so, `operation` has raised CapabilityMissing with its name."""
    if getattr(store.capabilities, capability):
        return False
    with pytest.raises(CapabilityMissing, match=capability):
        operation()
    return True
