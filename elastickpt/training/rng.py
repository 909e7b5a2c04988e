"""`RNG`: the random streams of this process.

On the same layout every stream continues exactly. On another, a kind of stream that was equal on all ranks that saved
stays equal (DTensor wants one stream for each mesh), and the others are seeded anew from (seed, step, kind, rank). What one
process alone saved is continued by the first of several ranks, and seeded anew on the others: ranks that all draw the same
augmentations would lose what data parallelism is for, without a word.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from elastickpt.errors import Malformed
from elastickpt.format.encode_values import typed_key
from elastickpt.format.values import ArrayValue, Value
from elastickpt.training.values import array_value, carried, revived, tensor_of


class RNG:
    """An entry of `state` that stands for this process's random streams.

    Torch's CPU generator, the generator of the current CUDA device (where there is one), Python's `random` and numpy's
    global generator. Generators that the program makes itself are no part of it: put their state into `state`. On the
    layout that saved them all streams go on exactly; on another, those that were equal on all ranks stay equal, and others
    are seeded anew, which the report says.

    Examples:
        >>> info = ek.save({"rng": ek.RNG()}, "out/streams")
        >>> drawn = torch.rand(1)
        >>> report = ek.load({"rng": ek.RNG()}, "out/streams")
        >>> torch.equal(torch.rand(1), drawn)
        True
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "RNG()"


@dataclass(frozen=True, slots=True)
class _Stream:
    """One kind of stream: how to read it, to set it, and to seed it anew."""

    get: Callable[[], Value]
    set: Callable[[Value], None]
    seed: Callable[[int], object]


def _get_python() -> Value:
    version, key, gauss = random.getstate()
    return {"version": version, "key": carried(numpy.asarray(key, dtype=numpy.uint32), "/rng/python"), "gauss": gauss}


def _set_python(value: Any) -> None:
    key: Any = revived(value["key"])
    random.setstate((value["version"], tuple(int(word) for word in key), value["gauss"]))


def _get_cuda() -> Value:
    return array_value(torch.cuda.get_rng_state())


def _set_cuda(value: Any) -> None:
    torch.cuda.set_rng_state(tensor_of(value))


def _set_numpy(value: Any) -> None:
    numpy.random.set_state(revived(value))  # type: ignore[arg-type]


_STREAMS: Mapping[str, _Stream] = {
    "torch": _Stream(
        get=lambda: array_value(torch.get_rng_state()),
        set=lambda value: torch.set_rng_state(_tensor(value)),
        seed=torch.default_generator.manual_seed,
    ),
    "cuda": _Stream(get=_get_cuda, set=_set_cuda, seed=torch.cuda.manual_seed),
    "python": _Stream(get=_get_python, set=_set_python, seed=random.seed),
    "numpy": _Stream(
        get=lambda: carried(numpy.random.get_state(legacy=False), "/rng/numpy"),
        set=_set_numpy,
        seed=lambda seed: numpy.random.seed(seed % 2**32),
    ),
}


def _tensor(value: Value) -> torch.Tensor:
    if not isinstance(value, ArrayValue):
        raise TypeError(f"expected an ArrayValue, found {type(value).__name__}")
    return tensor_of(value)


def _here() -> tuple[str, ...]:
    return tuple(kind for kind in _STREAMS if kind != "cuda" or torch.cuda.is_available())


def streams() -> Value:
    """The state of all streams of this process and the seed they came from. Consumes nothing of them."""
    return {"seed": torch.initial_seed(), "streams": {kind: _STREAMS[kind].get() for kind in _here()}}


@dataclass(frozen=True, slots=True, eq=False)
class Continuation:
    """How the streams of this process go on: `states` of kinds that go on from there, `seeds` of those that begin anew; `notes`
    say what is not exact."""

    states: Mapping[str, Value]
    seeds: Mapping[str, int]
    notes: tuple[str, ...]

    def install(self) -> None:
        """Sets the streams; the second time they are set to the same again."""
        for kind, state in self.states.items():
            _STREAMS[kind].set(state)
        for kind, seed in self.seeds.items():
            _STREAMS[kind].seed(seed)


def continued(saved: Value) -> Continuation:
    """Each stream goes on exactly where this rank's was saved."""
    found = _checked(saved)["streams"]
    notes = tuple(_absent(kind) for kind in _here() if kind not in found)
    return Continuation({kind: found[kind] for kind in _here() if kind in found}, {}, notes)


def rederived(saved: Sequence[Value], *, step: int | None, rank: int, ranks: Sequence[int]) -> Continuation:
    """For another layout, which `ranks` have now, from the streams of all ranks that saved: equal ones stay, others are seeded
    anew; the one of a single process goes on on the first of several ranks only."""
    every = [_checked(one) for one in saved]
    going_on: dict[str, Value] = {}
    seeds: dict[str, int] = {}
    notes: list[str] = []
    for kind in _here():
        states = [one["streams"][kind] for one in every if kind in one["streams"]]
        shared_out = len(states) == 1 < len(ranks)
        if not states:
            notes.append(_absent(kind))
        elif shared_out:
            going = f"rank {ranks[0]} goes on with it, on the others it was seeded anew from (seed, step, rank)"
            notes.append(f"{_name(kind)} is that of one process: {going}")
        elif len({typed_key(state) for state in states}) > 1:
            notes.append(f"{_name(kind)} was not the same on all ranks that saved: seeded anew from (seed, step, rank)")
        if states and (rank == ranks[0] if shared_out else len({typed_key(state) for state in states}) == 1):
            going_on[kind] = states[0]
        elif states:
            seeds[kind] = _derived(kind, every[0]["seed"], step or 0, rank)
    return Continuation(going_on, seeds, tuple(notes))


def _checked(saved: Any) -> Any:
    try:
        int(saved["seed"]), dict(saved["streams"])
    except (TypeError, KeyError, ValueError):
        raise Malformed("random streams in the checkpoint: expected a mapping with `seed` and `streams`") from None
    return saved


def _absent(kind: str) -> str:
    return f"{_name(kind)} is not in the checkpoint and stays as it is"


def _name(kind: str) -> str:
    return f"the random stream of {kind}"


def _derived(kind: str, seed: int, step: int, rank: int) -> int:
    text = f"{kind}/{seed}/{step}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1  # torch takes 63 bits
