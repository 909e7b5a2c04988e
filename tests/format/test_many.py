"""Values made from columns are those that are made one by one."""

from __future__ import annotations

from itertools import repeat

import pytest

from elastickpt.errors import InternalError
from elastickpt.format.arrays import ArrayId, ArraySpec
from elastickpt.format.many import many


def test_values_from_columns_are_those_made_one_by_one() -> None:
    names = [f"n{number}" for number in range(5)]
    ids = many(ArrayId, 5, section=repeat("extra"), item=repeat("i"), name=names, state=repeat(""))
    assert ids == [ArrayId("extra", "i", name, "") for name in names]
    assert list(map(hash, ids)) == [hash(ArrayId("extra", "i", name, "")) for name in names]
    specs = many(ArraySpec, 5, id=ids, shape=repeat((2, 3)), dtype=iter(["float32"] * 5))
    assert specs == [ArraySpec(one, (2, 3), "float32") for one in ids]
    assert many(ArrayId, 0, section=(), item=(), name=(), state=()) == []


def test_columns_are_the_fields_and_long_enough() -> None:
    with pytest.raises(InternalError, match="ArraySpec has other fields than"):
        many(ArraySpec, 1, id=repeat(None), shape=repeat(()))
    with pytest.raises(InternalError, match="fewer were told their shape"):
        many(ArraySpec, 2, id=repeat(None), shape=[()], dtype=repeat("float32"))
