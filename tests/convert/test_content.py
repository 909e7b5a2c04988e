"""What only the bytes show: copies that differ, shares that are copies, averages, divisors. [LANG-20..24]"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from elastickpt.convert import reading
from elastickpt.convert.nodes import Agreement, Gathered, RankPart, resized
from elastickpt.convert.reading import Reading
from elastickpt.errors import ProgramFault, ReplicaConflict
from elastickpt.foreign.listing import ForeignCheckpoint, LocalTensor, RankListing, Storage, StoredTensor
from elastickpt.format.arrays import Box
from elastickpt.language.held import lower
from elastickpt.language.scope import Scope
from elastickpt.language.tree import NOWHERE
from elastickpt.storage.local import LocalStore
from tests.language.test_held_pieces import dims


def stored(folder: Path, name: str, array: np.ndarray, dtype: str) -> StoredTensor:
    (folder / name).write_bytes(array.tobytes())
    return StoredTensor(
        Storage(name, 0, array.nbytes), 0, array.shape, tuple(s // array.itemsize for s in array.strides), dtype
    )


def gathered(
    folder: Path,
    text: str,
    locals_: list[np.ndarray],
    *,
    agreement: Agreement = "same",
    divided: bool = True,
    divisor: Fraction = Fraction(1),
    dtype: str = "float32",
    **sizes: int,
) -> Gathered:
    scope = Scope(sizes, {"tp": len(locals_)})
    shares = []
    for tp, array in enumerate(locals_):
        held = lower(dims(text), scope, {"tp": tp})
        part = ((Box.whole(array.shape), stored(folder, f"rank{tp}", array, dtype)),)
        shares.append(RankPart(array.shape, part, held.pieces, f"w of rank {tp}", agreement, divisor, (tp,)))
    return Gathered(held.whole, dtype, tuple(shares), divided, NOWHERE)


def read(folder: Path, node: Gathered) -> tuple[np.ndarray, list[str]]:
    reading = Reading(store=LocalStore(str(folder)))
    words = reading.words(node)
    reading.close()
    return words.view(np.dtype(node.dtype) if node.dtype != "bfloat16" else ml_dtypes.bfloat16).reshape(
        node.shape
    ), reading.notes


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_copies_that_differ_are_refused_with_index_and_both_values(tmp_path) -> None:
    other = numbers(3, 4)
    other[1, 2] = -1
    with pytest.raises(ReplicaConflict, match=r"element \(1, 2\): 6.0 in w of rank 0, -1.0 in w of rank 1"):
        read(tmp_path, gathered(tmp_path, "a b", [numbers(3, 4), other], a=3, b=4))


def test_copies_are_equal_by_their_bits(tmp_path) -> None:
    nan = np.array([np.nan, 1], dtype=np.float32)
    assert np.isnan(read(tmp_path, gathered(tmp_path, "a", [nan, nan.copy()], a=2))[0][0])
    with pytest.raises(ReplicaConflict):
        read(tmp_path, gathered(tmp_path, "a", [np.zeros(2, np.float32), -np.zeros(2, np.float32)], a=2))


def test_buffers_may_differ_and_the_first_is_kept(tmp_path) -> None:
    found, notes = read(tmp_path, gathered(tmp_path, "a", [numbers(4), numbers(4) + 1], agreement="any", a=4))
    assert found.tolist() == [0, 1, 2, 3]
    assert notes == [
        "w of rank 1 differs from w of rank 0 at element (0,): 0.0 in w of rank 0, 1.0 in w of rank 1; the first is kept"
    ]


def test_shares_that_are_all_equal_are_refused_unless_meant_or_trivial(tmp_path) -> None:
    same = numbers(65)
    with pytest.raises(ProgramFault, match="say 'same AXIS' if they are copies"):
        read(tmp_path, gathered(tmp_path, "a/tp", [same, same.copy()], a=130))
    assert read(tmp_path, gathered(tmp_path, "a/tp", [same, same.copy()], divided=False, a=130))[0].shape == (130,)
    assert read(tmp_path, gathered(tmp_path, "a/tp", [numbers(64), numbers(64)], a=128))[0].shape == (128,)
    ones = np.ones(65, np.float32)
    assert read(tmp_path, gathered(tmp_path, "a/tp", [ones, ones.copy()], a=130))[0].shape == (130,)
    assert read(tmp_path, gathered(tmp_path, "a/tp", [same, same + 1], a=130))[0].shape == (130,)


def test_a_mean_is_made_in_double_in_order_and_rounded_once(tmp_path) -> None:
    parts = [np.array([1e8, 1], np.float32), np.array([1, 2], np.float32), np.array([-1e8, 4], np.float32)]
    found, _ = read(tmp_path, gathered(tmp_path, "a", parts, agreement="average", a=2))
    wanted = ((parts[0].astype(np.float64) + parts[1] + parts[2]) / 3).astype(np.float32)
    assert found.tolist() == wanted.tolist()


def test_a_mean_is_made_in_pieces_that_read_what_they_need(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "_AVERAGED_COUNT", 8)
    parts = [numbers(5, 6) * (k + 1) for k in range(3)]
    taken: list[int] = []
    take = reading.Buffers.take
    monkeypatch.setattr(
        reading.Buffers, "take", lambda self, nbytes, phase=0: taken.append(nbytes) or take(self, nbytes, phase)
    )
    found, _ = read(tmp_path, gathered(tmp_path, "a b", parts, agreement="average", a=5, b=6))
    assert np.array_equal(found, numbers(5, 6) * 2)
    assert max(taken[1:]) <= 8 * 4  # beside the array itself


def test_what_ranks_hold_of_one_worker_is_compared_before_the_mean_is_made(tmp_path) -> None:
    node = gathered(tmp_path, "a", [numbers(4), numbers(4), numbers(4) + 3], agreement="average", a=4)
    same = replace(node, shares=tuple(replace(one, worker=(k // 2,)) for k, one in enumerate(node.shares)))
    assert np.array_equal(read(tmp_path, same)[0], numbers(4) + 1.5)
    other = replace(node, shares=tuple(replace(one, worker=((k + 1) // 2,)) for k, one in enumerate(node.shares)))
    with pytest.raises(ReplicaConflict, match=r"element \(0,\): 0.0 in w of rank 1, 3.0 in w of rank 2"):
        read(tmp_path, other)


@pytest.mark.parametrize("by", [2, 4, 3])
def test_what_is_stored_divided_is_multiplied(tmp_path, by: int) -> None:
    whole = numbers(6) + 1
    part = (whole / by).astype(np.float32)
    found, _ = read(tmp_path, gathered(tmp_path, "a", [part] * by, divisor=Fraction(by), a=6))
    if by != 3:
        assert found.tolist() == whole.tolist()
    assert np.allclose(found, whole, rtol=1e-6)


def test_bf16_stays_bits(tmp_path) -> None:
    bits = np.arange(256, dtype=np.uint16) * 257
    found, _ = read(tmp_path, gathered(tmp_path, "a/tp", [bits[:128], bits[128:]], dtype="bfloat16", a=256))
    assert found.view(np.uint16).tolist() == bits.tolist()


def test_padding_grows_with_zeros_and_shrinks_to_the_true_rows(tmp_path) -> None:
    node = gathered(tmp_path, "a b", [numbers(4, 2)], a=4, b=2)
    reading = Reading(store=LocalStore(str(tmp_path)))
    assert reading.words(resized(node, (6, 2))).view(np.float32).tolist() == [*range(8), 0, 0, 0, 0]
    assert reading.words(resized(node, (3, 2))).view(np.float32).tolist() == [*range(6)]
    assert resized(node, (4, 2)) is node
    reading.close()


def test_a_state_of_a_divided_tensor_needs_its_exponent(tmp_path) -> None:
    from elastickpt.convert.laid import lay
    from elastickpt.foreign.listing import ParamGroup
    from elastickpt.language.parse import parse

    whole = numbers(4)
    value, moment = (stored(tmp_path, name, one, "float32") for name, one in (("v", whole / 2), ("m", whole)))
    tensors = (LocalTensor("model", "bias", "value", value), LocalTensor("optimizer", 0, "exp_avg", moment))
    group = ParamGroup("optimizer", (0,), {"lr": 1.0})
    ranks = tuple(RankListing((("tp", tp),), f"rank {tp}", tensors, (group,), {}) for tp in range(2))
    found = ForeignCheckpoint("megatron-legacy", str(tmp_path), (), ranks=ranks)
    text = "ucl 1\nmesh m = tp\norder optimizer = all\nin model\n    bias  h  same tp  stored /|tp|{more}\n"
    with pytest.raises(ProgramFault, match="say its exponent"):
        lay(found, parse(text.format(more="")), {}, bytes)
    contents = lay(found, parse(text.format(more=" (exp_avg: -1)")), {}, bytes)
    reading = Reading(store=LocalStore(str(tmp_path)))
    made = {one.id.state: reading.words(one.node).view(np.float32).tolist() for one in contents.arrays.values()}
    reading.close()
    assert made == {"value": whole.tolist(), "exp_avg": (whole / 2).tolist()}
