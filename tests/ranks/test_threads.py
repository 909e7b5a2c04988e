"""What is done later is done once for all who asked, and again for who asks behind that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastickpt.ranks import threads
from elastickpt.ranks.threads import Postponed


@pytest.fixture
def due(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What would be done later, in the order in which it was asked for."""
    asked: list[Callable[[], object]] = []
    monkeypatch.setattr(threads, "later", lambda name, seconds, work: asked.append(work))
    return asked


def test_what_is_postponed_is_done_once_for_all_who_ask_until_then(due: list[Callable[[], object]]) -> None:
    done: list[int] = []
    postponed = Postponed("elastickpt-tests", 0.5, lambda: done.append(len(due)))
    for turn in (1, 2):
        postponed.ask()
        postponed.ask()
        assert len(due) == turn
        due[-1]()
        assert done == list(range(1, turn + 1))


def test_who_asks_while_it_is_done_has_it_done_again(due: list[Callable[[], object]]) -> None:
    postponed = Postponed("elastickpt-tests", 0.5, lambda: postponed.ask())
    postponed.ask()
    due[0]()
    assert len(due) == 2
