"""The interpreter of pickle opcodes: what it makes, what it refuses, and that it can be made to do nothing else.

[FOR-10..16]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import pickle
import re
import signal
import struct
import tracemalloc
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import _weights_only_unpickler as weights_only

from elastickpt.errors import LimitExceeded, Malformed, Unsafe, Unsupported, ValueNotCarried
from elastickpt.foreign.pickle_emitter import emit_pickle
from elastickpt.foreign.pickle_machine import read_pickle
from elastickpt.foreign.pickle_names import NAMES
from elastickpt.foreign.pickle_values import ElementType, Instance
from elastickpt.foreign.plain_values import from_plain, to_plain
from elastickpt.format.encode_values import encode_value
from elastickpt.format.values import ArrayValue, DtypeValue


def no_storage(_: object) -> object:
    raise Unsafe("a.pkl: a storage")


def read(data: bytes) -> object:
    return read_pickle(data, names=NAMES, persistent=no_storage, where="a.pkl")


def plain(value: object) -> object:
    return to_plain(value, lambda _: b"", where="")


atoms = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 600), 1 << 600)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(min_size=1)
)
keys = st.text(max_size=5) | st.integers() | st.tuples(st.integers(), st.text(max_size=3))
values = st.recursive(
    atoms | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(keys, inner, max_size=5)
        | st.dictionaries(keys, inner, max_size=5).map(OrderedDict)
        | st.sets(keys, max_size=5)
        | st.dictionaries(keys, st.integers(), max_size=5).map(Counter)
    ),
    max_leaves=20,
)


@given(values, st.sampled_from([2, 3, 4, 5]))
def test_plain_values_come_back_from_every_protocol(value, protocol) -> None:
    found = read(pickle.dumps(value, protocol=protocol))
    assert found == value
    assert type(found) is type(value)


@given(values)
def test_what_is_emitted_is_read_by_pickle_and_by_the_reader(value) -> None:
    data = emit_pickle(value, lambda _: "0")
    assert read(data) == value
    assert pickle.loads(data) == value  # noqa: S301


def test_every_name_that_torch_takes_by_itself_is_known() -> None:
    assert sorted(set(weights_only._get_allowed_globals()) - set(NAMES)) == []


def test_the_names_beyond_those_of_torch_are_stand_ins_only() -> None:
    more = set(NAMES) - set(weights_only._get_allowed_globals())
    made = {type(NAMES[name].make((1, 2))) for name in more if name.partition(".")[0] != "torch" or "distributed" in name}
    assert made == {Instance}
    assert {name for name in more if name.startswith("torch.") and "distributed" not in name} == set()


class Unlisted:
    """A class of this module, which no list knows."""


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (torch.load, "torch.serialization.load"),
        (datetime.timedelta(1), "datetime.timedelta"),
        (defaultdict(list), "collections.defaultdict"),
        (range(3), "range"),
        (Unlisted(), "Unlisted"),
        (io.StringIO("x"), "_io.StringIO"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_name_beyond_the_list_is_refused_with_what_it_is(value, name, protocol) -> None:
    with pytest.raises(Unsafe, match=name):
        read(pickle.dumps({"x": value}, protocol=protocol))


def protocol2(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


@pytest.mark.parametrize(
    "data",
    [
        protocol2(b"cposix\nsystem\nX\x04\0\0\0true\x85R"),
        protocol2(b"c__builtin__\neval\nX\x01\0\0\x001\x85R"),
        protocol2(b"(cos\nsystem\nX\x04\0\0\0trueo"),  # OBJ
        protocol2(b"(X\x04\0\0\0trueios\nsystem\n"),  # INST
        protocol2(b"\x82\x01"),  # EXT1
        protocol2(b"Pstorage\n"),  # PERSID
        protocol2(b"]2"),  # DUP
        protocol2(b"]0N"),  # POP
        protocol2(b"S'a'\n"),  # STRING
        protocol2(b"\x97"),  # NEXT_BUFFER
        protocol2(b"}N\x85R"),  # a mapping is called
        protocol2(b"ctorch\nfloat32\n)R"),  # a value is called
        protocol2(b"}}b"),  # the state of a mapping
        protocol2(b"]}b"),  # the state of a list
        protocol2(b"}Na"),  # append to a mapping
        protocol2(b"]NNs"),  # set a member of a list
        b"\x80\x06N.",
    ],
)
def test_what_could_do_something_is_refused(data) -> None:
    with pytest.raises(Unsafe):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02N",
        protocol2(b""),
        protocol2(b"h\x01"),
        protocol2(b"u"),
        protocol2(b"t"),
        protocol2(b"X\xff\xff\xff\xffa"),
        protocol2(b"X\x01\0\0\0\xff"),
        protocol2(b"cabc"),
        protocol2(b"}]Ns"),  # a list as key
        protocol2(b"ccollections\nOrderedDict\nK\x01\x85R"),
        protocol2(b"c__builtin__\ncomplex\nX\x01\0\0\0aK\x01\x86R"),
        protocol2(b"ctorch\nSize\nX\x01\0\0\0a\x85R"),
        protocol2(b"}(Nu"),
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    ],
)
def test_what_is_no_whole_pickle_is_malformed(data) -> None:
    with pytest.raises(Malformed):
        read(data)


def deep(opcode: bytes, count: int) -> bytes:
    return protocol2(b")" + opcode * count)


SELF = protocol2(b"]q\x00h\x00a")
LAUGHS = protocol2(
    b"]q\x00" + b"".join(b"](" + b"h" + bytes((k,)) + b"h" + bytes((k,)) + b"eq" + bytes((k + 1,)) for k in range(60))
)
OBJECTS = protocol2(b"cargparse\nNamespace\n" * 50_000 + b")" + b"R\x85" * 50_000)
DEEP_KEY = protocol2(b"})" + b"\x85" * 100_000 + b"Ns")
WIDE_KEY = protocol2(b"})" + b"".join(b"q" + bytes((k,)) + b"h" + bytes((k,)) + b"\x86" for k in range(12)) + b"Ns")


@pytest.mark.parametrize(
    "data",
    [SELF, LAUGHS, DEEP_KEY, WIDE_KEY, deep(b"\x85", 101), deep(b"\x85", 200_000), protocol2(b"\x8f" * 100_000), OBJECTS],
    ids=["itself", "laughs", "deep key", "wide key", "deep", "very deep", "sets", "objects"],
)
def test_cycles_depth_sharing_and_amplification_are_refused(data) -> None:
    with pytest.raises(LimitExceeded):
        read(data)


def test_memory_is_bounded_by_the_pickles_length() -> None:
    """The opcodes that make most of one byte, and lengths that promise more than there is."""
    tracemalloc.start()
    try:
        for data in (protocol2(b"\x8f" * 200_000), protocol2(b"(" * 200_000), protocol2(b"X\xff\xff\xff\xff"), SELF, LAUGHS):
            with pytest.raises((Malformed, LimitExceeded)):
                read(data)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(a=1, b=[2], inner=argparse.Namespace(c=3)),
        signal.SIGTERM,
        PurePosixPath("a/b"),
        torch.float8_e4m3fn,
        torch.device("cuda:1"),
        torch.Size([2, 3]),
        np.float32(1.5),
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.array(True),
        bytearray(b"ab"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_frameworks_put_beside_tensors_can_be_carried(value, protocol) -> None:
    """As a value that has a spelling on disk."""
    encode_value(plain(read(pickle.dumps({"x": value}, protocol=protocol))), where="")


def test_objects_and_element_types_go_into_values_and_back() -> None:
    """[FOR-7]"""
    found = read(pickle.dumps({"args": argparse.Namespace(dtype=torch.bfloat16, names=("a",))}))
    carried = plain(found)
    assert carried["args"]["state"] == {"dtype": DtypeValue("bfloat16"), "names": ("a",)}
    back = from_plain(carried)["args"]
    assert (back.name, back.state) == ("argparse.Namespace", {"dtype": ElementType("bfloat16"), "names": ("a",)})


def test_numpys_numbers_keep_their_bits() -> None:
    given = np.linspace(0, 1, 7, dtype="<f8")
    assert plain(read(pickle.dumps(given))) == ArrayValue("float64", (7,), given.tobytes(), "numpy")


@pytest.mark.parametrize("value", [np.arange(3, dtype=">i4"), np.array(["a"]), np.array([None]), np.ones((2, 3), order="F")])
def test_numpys_other_arrays_are_not_carried(value) -> None:
    with pytest.raises((ValueNotCarried, Malformed)):
        plain(read(pickle.dumps(value)))


@pytest.mark.parametrize("encoding", ["latin1", "ISO-8859-1", "iso8859_1", "utf-8"])
def test_bytes_that_are_written_as_text_are_read(encoding: str) -> None:
    pickled = b"c_codecs\nencode\n(X\x02\0\0\0abX" + len(encoding).to_bytes(4, "little") + encoding.encode() + b"tR."
    assert read(pickled) == b"ab"


@pytest.mark.parametrize("encoding", ["lauin1", "rot13", "", "../x", "utf-16", "x\0"])
def test_bytes_in_an_encoding_that_no_pickle_uses_are_refused(encoding: str) -> None:
    pickled = b"c_codecs\nencode\n(X\x02\0\0\0abX" + len(encoding).to_bytes(4, "little") + encoding.encode() + b"tR."
    with pytest.raises(Malformed, match=r"_codecs\.encode cannot be made of these arguments"):
        read(pickled)


@given(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from(["flip", "cut", "insert", "remove"]))
def test_a_mutated_pickle_ends_in_a_value_or_a_typed_error(at, byte, how) -> None:
    value = {"model": OrderedDict(a=torch.Size([1]), b=(1, 2.0, "c")), "args": argparse.Namespace(x=np.arange(2)), "s": {1, 2}}
    data = bytearray(pickle.dumps(value, protocol=at % 4 + 2))
    at %= len(data)
    if how == "flip":
        data[at] ^= byte or 1
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = struct.pack("<BQ", byte, byte)
    else:
        del data[at : at + byte]
    with contextlib.suppress(Unsafe, Malformed, Unsupported):
        read(bytes(data))


def test_the_lists_of_the_spec_are_the_names() -> None:
    text = (Path(__file__).resolve().parents[2] / "spec" / "foreign-files.md").read_text()
    pickles = text.partition("## Pickles")[2].partition("\n## ")[0]
    first, second = re.findall(r"```\n(.*?)\n```", pickles, re.DOTALL)
    assert first.split() == sorted(weights_only._get_allowed_globals())
    assert second.split() == sorted(set(NAMES) - set(weights_only._get_allowed_globals()))
