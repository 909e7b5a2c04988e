"""Values come back with their exact types and bits, or are refused with their place."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.errors import LimitExceeded, ValueNotCarried
from elastickpt.format.canonical_json import dump, parse
from elastickpt.format.decode_values import decode_value
from elastickpt.format.encode_values import encode_pointers, encode_value, value_digest, values_equal
from elastickpt.format.values import (
    FACTORIES,
    ArrayReference,
    ArrayValue,
    DeviceValue,
    DtypeValue,
    EnumValue,
    NamedTupleValue,
    StateReference,
)
from elastickpt.format.version import MAX_DEPTH, features_in, features_used

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_numbers = st.integers() | st.integers(2**53 - 2, 2**53 + 2) | st.floats() | st.booleans() | st.none()
_arrays = st.builds(
    lambda data, origin: ArrayValue("int16", (len(data), 1), b"".join(n.to_bytes(2, "little") for n in data), origin),
    st.lists(st.integers(0, 65535), max_size=3),
    st.sampled_from(["torch", "numpy"]),
)
_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4)
_named = (
    st.builds(DtypeValue, _names)
    | st.builds(DeviceValue, _names)
    | st.builds(EnumValue, _names, _names)
    | st.builds(StateReference, _names, st.sampled_from(["torch", "numpy"]))
    | st.just(ArrayValue("int8", (2, 1), b"ab", "numpy", (1, 0)))
)
_leaves = (
    _named
    | _numbers
    | _texts
    | st.binary(max_size=8)
    | st.complex_numbers()
    | _arrays
    | st.builds(ArrayReference, _texts, _texts)
)
_keys = st.recursive(
    st.integers() | _texts | st.floats(allow_nan=False) | st.binary(max_size=3) | st.none(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=2),
    max_leaves=3,
)


def _named_tuple(some: list[Any]) -> NamedTupleValue:
    return NamedTupleValue("m.P", tuple(f"f{k}" for k in range(len(some))), tuple(some))


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.dictionaries(_keys, inner, max_size=4)
    return (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | pairs
        | st.dictionaries(_texts, inner, max_size=4)
        | pairs.map(OrderedDict)
        | st.dictionaries(_keys, st.integers(), max_size=3).map(Counter)
        | st.builds(deque, st.lists(inner, max_size=3), st.sampled_from([None, 3, 9]))
        | st.builds(defaultdict, st.sampled_from([None, *FACTORIES.values()]), pairs)
        | st.lists(inner, max_size=3).map(
            lambda some: NamedTupleValue("m.P", tuple(f"f{k}" for k in range(len(some))), tuple(some))
        )
        | st.sets(_keys, max_size=3)
        | st.frozensets(_keys, max_size=3)
    )


_values = st.recursive(_leaves, _containers, max_leaves=12)


def exact(value: Any) -> Any:
    """A form in which equality is equality of types and bits: the slow, obvious comparison."""
    kind = type(value).__name__
    if isinstance(value, float):
        return kind, "nan" if math.isnan(value) else value.hex()
    if isinstance(value, complex):
        return kind, exact(value.real), exact(value.imag)
    if isinstance(value, (list, tuple)):
        return kind, [exact(one) for one in value]
    if isinstance(value, deque):
        return kind, value.maxlen, [exact(one) for one in value]
    if isinstance(value, NamedTupleValue):
        return kind, value.type, value.fields, exact(value.values)
    if isinstance(value, dict):
        made = getattr(value, "default_factory", None)
        return kind, made, [(exact(key), exact(one)) for key, one in value.items()]
    if isinstance(value, (set, frozenset)):
        return kind, sorted(repr(exact(one)) for one in value)
    return kind, value


@given(_values)
def test_a_value_comes_back_with_its_types_bits_and_order(value: Any) -> None:
    text = dump(encode_value(value, where=""))
    back = decode_value(parse(text, where="value"), where="value")
    assert exact(back) == exact(value)
    assert dump(encode_value(back, where="")) == text


@given(_values)
def test_a_text_needs_the_features_of_its_value(value: Any) -> None:
    """[UCF-100]"""
    assert features_in(dump(encode_value(value, where=""))) == set(features_used([value], (), ()))


def test_a_text_of_a_user_is_no_tag() -> None:
    """[UCF-100]"""
    assert features_in(dump(encode_value(['{"$deque":', {'{"$enum":': 1, "$numpy": 2}], where=""))) == set()


@pytest.mark.parametrize(
    "odd", [ArrayReference("i", "x", "numpy"), ArrayReference("i", "é"), ArrayReference("é", "x"), {"$tensor": 1}, 7]
)
def test_many_references_come_back_also_beside_another_value(odd: Any) -> None:
    for value in ({f"{k}": ArrayReference("i", f"a/{k}") for k in range(20)}, {"odd": odd}):
        whole = {**{f"é{k}": ArrayReference("i", f"{k}") for k in range(9)}, **value}
        assert exact(decode_value(parse(dump(encode_value(whole, where="")), where="value"), where="value")) == exact(whole)


@given(_values, _values)
def test_equal_digests_are_equal_values(one: Any, other: Any) -> None:
    if exact(one) == exact(other):
        assert values_equal(one, other)
    assert values_equal(one, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ([1], (1,)),
        ({}, OrderedDict()),
        ({1}, frozenset({1})),
        ("1", b"1"),
        (None, False),
    ],
)
def test_values_of_other_types_or_bits_have_other_digests(one: Any, other: Any) -> None:
    assert value_digest(one) != value_digest(other)


def test_filling_order_counts_only_where_the_type_says_so() -> None:
    assert values_equal({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert values_equal({1: 1, "b": 2}, {"b": 2, 1: 1})
    assert values_equal(Counter("ab"), Counter("ba"))
    assert not values_equal(OrderedDict(a=1, b=2), OrderedDict(b=2, a=1))


class _Color(IntEnum):
    RED = 1


_Point = namedtuple("_Point", "x y")


@pytest.mark.parametrize(
    ("value", "place", "what"),
    [
        ({"lr_lambdas": [len]}, "/scheduler/lr_lambdas/0", "a builtin_function_or_method"),
        ({"lr_lambdas": [lambda step: step]}, "/scheduler/lr_lambdas/0", "a function"),
        ({"a/b": {"~": object()}}, "/scheduler/a~1b/~0", "an object"),
        ({"e": _Color.RED}, "/scheduler/e", "_Color"),
        ({"p": _Point(1, 2)}, "/scheduler/p", "_Point"),
        ({"d": defaultdict(lambda: 1)}, "/scheduler/d", "defaultdict"),
        ({"n": np.float64(1.0)}, "/scheduler/n", "numpy.float64"),
        ({1: {2: {3}, 4: [{5}, bytearray()]}}, "/scheduler/1/4/1", "a bytearray"),
        ({"t": "\ud800"}, "/scheduler/t", "lone surrogate"),
        ({"a": ArrayValue("int8", (65537,), bytes(65537), "torch")}, "/scheduler/a", "65537 bytes"),
        ({"a": ArrayValue("int8", (2,), bytes(3), "torch")}, "/scheduler/a", "no int8 array"),
        ({"i": 10**4096}, "/scheduler/i", "4096 digits"),
        ({"s": {math.nan, float("nan")}}, "/scheduler/s", "the same on disk"),
    ],
)
def test_what_has_no_spelling_is_refused_with_its_place(value: Any, place: str, what: str) -> None:
    """[UCF-59]"""
    with pytest.raises(ValueNotCarried) as caught:
        encode_value(value, where="/scheduler")
    assert caught.value.message.startswith(f"{place}: ")
    assert what in caught.value.message


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_nesting_is_limited_on_both_sides() -> None:
    """[UCF-92]"""
    assert decode_value(encode_value(_nested(MAX_DEPTH), where=""), where="") == _nested(MAX_DEPTH)
    with pytest.raises(ValueNotCarried, match="16 deep"):
        encode_value(_nested(MAX_DEPTH + 1), where="")
    with pytest.raises(LimitExceeded, match="16 deep"):
        decode_value(_nested(MAX_DEPTH + 1), where="value")


def test_a_value_inside_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueNotCarried, match="inside itself"):
        encode_value(loop, where="/loader")


def test_values_of_a_record_are_keyed_by_pointers() -> None:
    with pytest.raises(ValueNotCarried, match="no JSON pointer"):
        encode_pointers({"scheduler": 1}, where="replicated values")
    with pytest.raises(ValueNotCarried, match="expected a mapping"):
        encode_pointers([1], where="replicated values")
