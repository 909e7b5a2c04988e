"""Plain values are copied with their types and bits, or refused with their place."""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy
import pytest
import torch
from fingerprint import fingerprint
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.errors import ValueNotCarried
from elastickpt.format.arrays import DTYPES
from elastickpt.format.encode_values import typed_key
from elastickpt.format.values import ArrayValue
from elastickpt.format.version import MAX_DEPTH
from elastickpt.training.values import array_value, carried, place_of, revived, scalar_values, tensor_of


class Level(enum.IntEnum):
    HIGH = 3


def inside_itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=4),
    st.binary(max_size=4),
)
KEYS = st.one_of(st.booleans(), st.integers(), st.text(max_size=3), st.tuples(st.integers(), st.text(max_size=2)))
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        st.sets(KEYS, max_size=3),
        st.frozensets(KEYS, max_size=3),
        st.dictionaries(KEYS, st.integers(), max_size=3).map(Counter),
    ),
    max_leaves=8,
)


@given(VALUES)
def test_a_value_comes_back_with_types_bits_and_order(value: object) -> None:
    assert fingerprint({"v": revived(carried(value, "/v"))}) == fingerprint({"v": value})


@given(VALUES, VALUES)
def test_keys_are_equal_exactly_when_representations_are(one: object, other: object) -> None:
    if repr(one) == repr(other):
        assert typed_key(one) == typed_key(other)
    elif one != other:
        assert typed_key(one) != typed_key(other)


@pytest.mark.parametrize(
    ("one", "other"), [(1, True), (1, 1.0), (0.0, -0.0), ([1], (1,)), ({"a": 1}, OrderedDict(a=1)), (b"a", "a")]
)
def test_values_of_other_types_or_signs_are_not_the_same(one: object, other: object) -> None:
    assert typed_key(one) != typed_key(other)
    assert typed_key([float("nan")]) == typed_key([float("nan")])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3)])
def test_a_tensor_of_any_type_comes_back_bit_for_bit(name: str, shape: tuple[int, ...]) -> None:
    dtype = getattr(torch, name)
    count = int(numpy.prod(shape)) * dtype.itemsize
    data = bytes(k % 2 if name == "bool" else (37 * k + 129) % 256 for k in range(count))
    tensor = tensor_of(ArrayValue(name, shape, data, "torch"))
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
    assert array_value(tensor).data == data
    assert fingerprint({"v": revived(carried([tensor], "/v"))}) == fingerprint({"v": [tensor]})


def test_views_and_conjugates_are_carried_as_they_read() -> None:
    matrix = torch.arange(6, dtype=torch.float32).reshape(2, 3).t()
    assert torch.equal(tensor_of(array_value(matrix)), matrix)
    z = torch.tensor([1 + 2j])
    assert torch.equal(tensor_of(array_value(z.conj())), z.conj())


def test_many_scalars_are_carried_like_each_alone() -> None:
    tensors = [torch.tensor(1.5), torch.tensor(2), torch.tensor(True), torch.tensor(-0.0, dtype=torch.bfloat16)]
    assert scalar_values(tensors) == [array_value(tensor) for tensor in tensors]


@pytest.mark.parametrize(
    "value",
    [
        numpy.float32(1.5),
        numpy.int64(-3),
        numpy.bool_(True),
        numpy.arange(6).reshape(2, 3),
        numpy.arange(6, dtype=">i4"),
        numpy.zeros((0, 2), dtype=numpy.float16),
        numpy.ones(3, dtype=ml_dtypes.bfloat16),
    ],
    ids=["float32", "int64", "bool", "array", "big-endian", "empty", "bfloat16"],
)
def test_numpy_values_come_back_as_numpy(value: Any) -> None:
    found: Any = revived(carried(value, "/v"))
    assert type(found) is type(value)
    assert found.dtype == value.dtype.newbyteorder("=")
    assert numpy.array_equal(found, value)


def test_a_copy_shares_nothing() -> None:
    inner = [1]
    value = {"a": inner, "t": torch.zeros(2)}
    copy: Any = carried(value, "/v")
    inner.append(2)
    value["t"].fill_(1)  # type: ignore[attr-defined]
    assert copy["a"] == [1]
    assert revived(copy)["t"].tolist() == [0, 0]  # type: ignore[index]


def test_a_torch_size_is_carried_as_a_tuple() -> None:
    assert typed_key(carried(torch.Size([2, 3]), "/v")) == typed_key((2, 3))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, lambda: 0]}, r"value /v/a/1: function .*<lambda>"),
        ({"a/b": {"~": object()}}, r"value /v/a~1b/~0: object"),
        (Level.HIGH, r"value /v: .*Level"),
        (defaultdict(lambda: 1, a=1), r"value /v: a defaultdict that makes its elements by"),
        (Path(), r"value /v: pathlib"),
        ({(1, Level.HIGH): 1}, r"value /v: a key or set element"),
        ({object(): 1}, r"value /v: a key or set element"),
        ({torch.zeros(1): 1}, r"value /v: a key or set element of type torch.Tensor .*: key it by a name or a number"),
        (inside_itself(), r"nested more than 16 deep, or inside itself"),
        ([numpy.zeros(9000)], r"value /v/0: an array of 72000 bytes .* put it into `state` as a tensor"),
        (torch.zeros(70_000, dtype=torch.uint8), r"value /v: an array of 70000 bytes"),
        (numpy.array(["a"]), r"value /v: numpy arrays of <U1"),
        (numpy.array([None]), r"value /v: numpy arrays of object"),
        (torch.zeros(2, device="meta"), r"value /v: a Tensor \(torch.strided, on meta\)"),
        (torch.zeros(2).to_sparse(), r"value /v: a Tensor \(torch.sparse_coo"),
        (torch.nn.Linear(1, 1), r"value /v: torch.nn.modules.linear.Linear"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_its_place(value: object, message: str) -> None:
    with pytest.raises(ValueNotCarried, match=message):
        carried(value, "/v")


def test_nesting_up_to_the_limit_is_carried() -> None:
    value: object = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert carried(value, "/v") == value
    with pytest.raises(ValueNotCarried):
        carried([value], "/v")


def test_places_are_json_pointers() -> None:
    assert place_of("a", "b/c", "d~e", 3) == "/a/b~1c/d~0e/3"
