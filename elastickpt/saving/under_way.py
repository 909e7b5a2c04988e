"""Places to which this process saves at this moment: a second save to one of them is refused while the first is under way."""

from __future__ import annotations

import threading

from elastickpt.errors import Refused

_PLACES: set[str] = set()
_CHANGING = threading.Lock()


def begin(place: str) -> None:
    """The place is taken until `end`. Raises Refused if it is."""
    with _CHANGING:
        _require_idle(place)
        _PLACES.add(place)


def end(place: str) -> None:
    """The place is free again."""
    with _CHANGING:
        _PLACES.discard(place)


def require_idle(place: str) -> None:
    """Raises Refused while a save to the place is under way."""
    with _CHANGING:
        _require_idle(place)


def _require_idle(place: str) -> None:
    if place in _PLACES:
        raise Refused(f"{place}: a save to it is still under way in this process; wait for its result, or choose another path")
