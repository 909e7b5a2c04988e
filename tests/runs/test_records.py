"""Names and small objects of a run: what is written reads back, else it is refused. [RUN-1..5, RUN-10..18, RUN-65, RUN-66]"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_actors import W, X, by, commit_of

from elastickpt.errors import ChecksumMismatch, Damaged, Malformed, Refused, Unsupported
from elastickpt.format.digest import seal
from elastickpt.ledger.names import (
    MAX_NUMBER,
    AttemptId,
    Name,
    adopted_name,
    claim_name,
    found_name,
    listing_of,
    parse_folder,
    parse_id,
    parse_name,
    parse_temporary,
    start_name,
    temporary_name,
)
from elastickpt.ledger.records import (
    AbortRegister,
    Adopted,
    Claim,
    EpochStart,
    Found,
    LaterMetrics,
    PassedOver,
    Void,
    decode_adopted,
    decode_claim,
    decode_metrics,
    decode_nothing_loaded,
    decode_register,
    decode_start,
    encode_adopted,
    encode_claim,
    encode_metrics,
    encode_nothing_loaded,
    encode_register,
    encode_start,
    metrics_of,
)
from elastickpt.storage.store import Entry

NUMBERS = st.integers(1, MAX_NUMBER)
IDS = st.builds(AttemptId, st.integers(0, MAX_NUMBER), NUMBERS, NUMBERS)
LATER = LaterMetrics(X, 2, metrics_of([("loss", 0.5)]))
TOLD = EpochStart(3, W, "last=3", Found(1000.5, True, (PassedOver(X, "checksum-mismatch", "c.0: block 0"),)))
NOTHING = Found(1000.5, False, (PassedOver(X, "checksum-mismatch", "c.0: block 0"),))

# how each object is written, and read under the name that it belongs under, or under another one
OBJECTS: dict[str, tuple[bytes, Callable[[bytes], object], Callable[[bytes], object]]] = {
    "claim": (
        encode_claim(Claim(3, by(1))),
        lambda data: decode_claim(data, epoch=3),
        lambda data: decode_claim(data, epoch=4),
    ),
    "adopted": (
        encode_adopted(Adopted(3, "t", 1, (W, X))),
        lambda data: decode_adopted(data, epoch=3),
        lambda data: decode_adopted(data, epoch=4),
    ),
    "void": (
        encode_adopted(Void(3, 4)),
        lambda data: decode_adopted(data, epoch=3),
        lambda data: decode_adopted(data, epoch=2),
    ),
    "start": (
        encode_start(EpochStart(3, X)),
        lambda data: decode_start(data, epoch=3),
        lambda data: decode_start(data, epoch=2),
    ),
    "start that tells": (
        encode_start(TOLD),
        lambda data: decode_start(data, epoch=3),
        lambda data: decode_start(data, epoch=4),
    ),
    "found": (
        encode_nothing_loaded(3, NOTHING),
        lambda data: decode_nothing_loaded(data, epoch=3),
        lambda data: decode_nothing_loaded(data, epoch=4),
    ),
    "commit": (
        encode_register(commit_of(X, metrics=metrics_of([("loss", math.inf)]))),
        lambda data: decode_register(data, attempt=X),
        lambda data: decode_register(data, attempt=W),
    ),
    "abort": (
        encode_register(AbortRegister(X, "disk full")),
        lambda data: decode_register(data, attempt=X),
        lambda data: decode_register(data, attempt=W),
    ),
    "metrics": (
        encode_metrics(LATER),
        lambda data: decode_metrics(data, attempt=X, number=2),
        lambda data: decode_metrics(data, attempt=X, number=3),
    ),
}
WRITTEN = {
    "claim": Claim(3, by(1)),
    "adopted": Adopted(3, "t", 1, (W, X)),
    "void": Void(3, 4),
    "start": EpochStart(3, X),
    "start that tells": TOLD,
    "found": NOTHING,
    "commit": commit_of(X, metrics=metrics_of([("loss", math.inf)])),
    "abort": AbortRegister(X, "disk full"),
    "metrics": LATER,
}


@given(IDS)
def test_names_of_an_attempt_read_back(attempt: AttemptId) -> None:
    """[RUN-1, RUN-2]"""
    assert parse_id(str(attempt)) == attempt
    assert parse_folder(attempt.folder) == (attempt, "attempt")
    assert parse_name(attempt.register) == Name("register", attempt.epoch, attempt)
    assert parse_name(attempt.metrics(7)) == Name("metrics", attempt.epoch, attempt, 7)
    assert parse_temporary(temporary_name(attempt.register)) == attempt.register


@given(NUMBERS)
def test_names_of_an_epoch_read_back(epoch: int) -> None:
    found = [parse_name(name(epoch)) for name in (claim_name, adopted_name, start_name, found_name)]
    assert found == [Name("claim", epoch), Name("adopted", epoch), Name("start", epoch), Name("found", epoch)]


@pytest.mark.parametrize(
    "name",
    [
        *("epoch-0.json", "epoch-01.json", "epoch-1.json.tmp", "epoch-1.void.json", "100-1-1.json", "latest"),
        *("0000000100-1.json", "00000000100-1-1.json", "0000000100-0-1.json", "0000000100-1-1.metrics-0.json"),
        "0000000100-1-1.json\n",
    ],
)
def test_other_names_mean_nothing(name: str) -> None:
    """One spelling for each name: two files could be the register of one attempt otherwise. [RUN-3]"""
    assert parse_name(name) is None
    assert listing_of([Entry(name, "file", 1)]).newest == 0


def test_what_is_no_file_means_nothing() -> None:
    """[RUN-3]"""
    listing = listing_of([Entry("epoch-7.json", "directory", 0), Entry("epoch-8.json", "other", 0)])
    assert listing.newest == 0


@pytest.mark.parametrize("wrong", [(-1, 1, 1), (1, 0, 1), (1, 1, 0), (True, 1, 1), (1.0, 1, 1), (1, 10**18, 1)])
def test_numbers_out_of_range_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(Refused):
        AttemptId(*wrong)


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_reads_back(kind: str) -> None:
    """[RUN-12..18]"""
    data, decode, _ = OBJECTS[kind]
    assert decode(data) == WRITTEN[kind]


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_under_another_name_is_found(kind: str) -> None:
    """[RUN-11]"""
    data, _, decode_other = OBJECTS[kind]
    with pytest.raises(Malformed):
        decode_other(data)


@pytest.mark.parametrize("kind", OBJECTS)
def test_every_flipped_bit_and_every_cut_is_found(kind: str) -> None:
    """[RUN-10]"""
    data, decode, _ = OBJECTS[kind]
    for place in range(len(data)):
        with pytest.raises(Damaged):
            decode(data[:place])
        for bit in range(8):
            with pytest.raises(Damaged):
                decode(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])


def _register(**members: object) -> bytes:
    about = {"format": "elastickpt-register", "version": 1, "id": str(X), "says": "commit", "folder": X.folder}
    about |= {"manifest": "0" * 32, "nbytes": 1, "time": 1.5, "metrics": {}}
    return seal({**about, **members}, where="register")


def test_the_base_of_the_following_is_read() -> None:
    decode_register(_register(), attempt=X)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"folder": "step-0000000010.1.1"}, {"folder": "../x"}, {"says": "maybe"}, {"manifest": "0" * 31}),
        *({"manifest": "G" * 32}, {"nbytes": -1}, {"time": 1}, {"metrics": []}, {"metrics": {"a": "b"}}, {"extra": 1}),
    ],
)
def test_a_register_with_a_wrong_member_is_refused(wrong: dict[str, object]) -> None:
    """[RUN-14]"""
    with pytest.raises(Malformed):
        decode_register(_register(**wrong), attempt=X)


def test_a_newer_version_is_told_from_damage() -> None:
    with pytest.raises(Unsupported):
        decode_register(_register(version=2), attempt=X)


@pytest.mark.parametrize("commits", [["0000000020-1-1", "0000000010-1-1"], ["0000000010-1-1"] * 2, ["0000000010-2-1"], ["x"]])
def test_adopted_commits_rise_and_are_of_older_epochs(commits: list[str]) -> None:
    """[RUN-15]"""
    about: dict[str, object] = {"format": "elastickpt-adopted", "version": 1, "epoch": 3, "void": False, "token": "t"}
    with pytest.raises(Malformed):
        decode_adopted(seal({**about, "below": 1, "commits": commits}, where="adopted"), epoch=3)


def test_an_epoch_starts_from_an_older_one() -> None:
    """Chains of starts end. [RUN-16]"""
    about: dict[str, object] = {"format": "elastickpt-start", "version": 1, "epoch": 1, "continued": str(X)}
    with pytest.raises(Malformed):
        decode_start(seal(about, where="start"), epoch=1)


def _start(**about: object) -> bytes:
    whole = {"format": "elastickpt-start", "version": 1, "epoch": 3, "continued": str(W)}
    return seal({**whole, **about}, where="start")


def test_a_start_from_before_it_told_anything_reads() -> None:
    """As it was written then, byte for byte. [RUN-68]"""
    old = b'{"format":"elastickpt-start","version":1,"epoch":2,"continued":"0000000040-1-1",'
    old += b'"digest":"668f43a8e8033cc9e25323713c1fdd32"}\n'
    assert decode_start(old, epoch=2) == EpochStart(2, AttemptId(40, 1, 1), None, None)
    assert encode_start(EpochStart(2, AttemptId(40, 1, 1))) == old


PASSED = {"id": str(X), "kind": "damaged", "message": ""}


@pytest.mark.parametrize(
    "found",
    [
        *(None, [], {}, {"time": 1.5, "verified": True}, {"time": 1.5, "passed": []}, {"verified": True, "passed": []}),
        *({"time": 1.5, "verified": verified, "passed": []} for verified in (1, None, "yes")),
        *({"time": time, "verified": True, "passed": []} for time in (1, "now", None)),
        {"time": 1.5, "verified": True, "passed": [], "more": 1},
        {"time": 1.5, "verified": True, "passed": PASSED},
        *(
            {"time": 1.5, "verified": True, "passed": passed}
            for passed in (
                [PASSED, PASSED],
                [{**PASSED, "id": str(W)}],
                [{**PASSED, "id": "0000000020-3-1"}],
                [{**PASSED, "id": "20-1-1"}],
                [{**PASSED, "kind": "Bad kind"}],
                [{**PASSED, "kind": ""}],
                [{**PASSED, "message": None}],
                [{**PASSED, "more": 1}],
                [{"id": str(X), "kind": "damaged"}],
            )
        ),
    ],
)
def test_what_a_restore_found_is_told_in_one_form(found: object) -> None:
    """[RUN-66]"""
    assert decode_start(_start(found={"time": 1.5, "verified": True, "passed": [PASSED]}), epoch=3).found is not None
    with pytest.raises(Malformed):
        decode_start(_start(found=found), epoch=3)


def test_nothing_that_was_loaded_was_not_verified() -> None:
    """[RUN-66]"""
    assert decode_start(_start(continued=None, found={"time": 1.5, "verified": False, "passed": []}), epoch=3).continued is None
    with pytest.raises(Malformed):
        decode_start(_start(continued=None, found={"time": 1.5, "verified": True, "passed": []}), epoch=3)


NUMBERS_ALIKE = [
    2,
    2.0,
    Fraction(2),
    Decimal(2),
    *(kind(2) for kind in (np.float16, np.float32, np.float64, np.int8, np.int64, np.uint64)),
    np.array(2.0),
    *(torch.tensor(2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)),
    torch.tensor(2.0, requires_grad=True) * 1,
    torch.nn.Parameter(torch.tensor(2.0)),
]


@pytest.mark.parametrize("number", NUMBERS_ALIKE, ids=lambda one: f"{type(one).__name__}-{getattr(one, 'dtype', '')}")
def test_a_metric_may_be_whatever_is_one_number(number: object) -> None:
    assert metrics_of([("loss", number)]) == (("loss", 2.0),)


WRONG = [
    "low",
    True,
    None,
    1j,
    10**400,
    np.bool_(True),
    torch.tensor(True),
    torch.ones(2),
    torch.ones(1),
    np.ones((1, 1)),
    [1.0],
]


@pytest.mark.parametrize("wrong", [*([("loss", one)] for one in WRONG), [(1, 1.0)]], ids=str)
def test_metrics_are_numbers_by_name(wrong: list[tuple[str, object]]) -> None:
    with pytest.raises(Refused, match="expected a name and a number without a dimension"):
        metrics_of(wrong)


def test_a_checksum_is_told_from_a_cut() -> None:
    data, decode, _ = OBJECTS["claim"]
    with pytest.raises(ChecksumMismatch):
        decode(data.replace(b"host1", b"host2"))
