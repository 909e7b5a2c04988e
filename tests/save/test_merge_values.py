"""Trees of values that ranks hold in parts: what is merged, what is a conflict."""

from __future__ import annotations

import pytest

from elastickpt.errors import ReplicaConflict
from elastickpt.format.values import ArrayReference, Value
from elastickpt.saving.messages import merge_values


def tensor(name: str) -> ArrayReference:
    return ArrayReference("stage", name)


def test_tensors_of_several_ranks_are_joined_in_the_order_of_the_lowest() -> None:
    trees: dict[int, Value] = {
        2: {"b": tensor("b"), "step": 3, "nested": {"x": tensor("nested/x")}},
        5: {"step": 3, "a": tensor("a"), "nested": {"y": tensor("nested/y")}},
        7: {"step": 3, "c": {"d": tensor("c/d")}, "nested": {}},
    }
    assert merge_values("/stage", trees) == {
        "b": tensor("b"),
        "step": 3,
        "nested": {"x": tensor("nested/x"), "y": tensor("nested/y")},
        "a": tensor("a"),
        "c": {"d": tensor("c/d")},
    }


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"step": 3}, {"step": 4}, r"value '/stage/step' of the state: ranks 0 and 1 hold different contents"),
        ({"step": 3}, {"step": 3.0}, "hold different contents"),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "'/stage/a/b'"),
        ([tensor("0")], [tensor("0"), tensor("1")], "'/stage' of the state"),
        ({"step": 3}, {}, r"'/stage/step' of the state: found on rank 0, not on rank 1"),
        ({}, {"a": {"t": tensor("a/t"), "n": 1}}, r"'/stage/a' of the state: found on rank 1, not on rank 0"),
        ({"a": tensor("a")}, {"a": 1}, "'/stage/a'"),
    ],
)
def test_what_differs_otherwise_is_refused_with_its_place(one: Value, other: Value, said: str) -> None:
    with pytest.raises(ReplicaConflict, match=said):
        merge_values("/stage", {0: one, 1: other})
