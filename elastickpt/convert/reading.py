"""Evaluates nodes: reads what they are made of, each tensor once, and puts it together in memory.

An array is words of its element size, flat, in C order: bits, never numbers. At most the array and what goes into it at one
time are in memory. What the files' content shows to be wrong with a program is found here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickpt.convert.nodes import Cast, Gathered, Mapped, Node, Recorded, Share, leaves
from elastickpt.errors import ReplicaConflict, Unsupported
from elastickpt.foreign.listing import StoredTensor
from elastickpt.foreign.tensor_bytes import read_tensor
from elastickpt.format.box import Box
from elastickpt.format.digest import file_digest
from elastickpt.format.dtypes import dtype_named
from elastickpt.language.faults import located
from elastickpt.language.held import HeldPiece, Side
from elastickpt.loading.fetch import fetch
from elastickpt.loading.opened import Opened
from elastickpt.loading.plan import Wanted
from elastickpt.storage.store import RangeReader, Store

Words = NDArray[Any]
_WORDS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "<c16"}
OPEN_FILES = 64
MAX_EQUAL_COUNT = 64  # elements up to which equal shares are taken for chance


class Reading:
    """Reads arrays of one source. `read` is told of bytes as they are read. `notes` collects what differed and was let pass."""

    def __init__(
        self,
        *,
        store: Store | None = None,
        opened: Opened | None = None,
        read: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self._store, self._opened, self._read = store, opened, read
        self._files: OrderedDict[str, RangeReader] = OrderedDict()
        self._kept: dict[int, Words] = {}
        self._uses: dict[int, int] = {}
        self.notes: list[str] = []

    def expect(self, nodes: Iterable[Node]) -> None:
        """These nodes will be evaluated, in any order: leaves that several of them need are kept until the last one."""
        self._kept.clear()
        self._uses.clear()
        for node in nodes:
            for leaf in leaves(node):
                self._uses[id(leaf)] = self._uses.get(id(leaf), 0) + 1

    def close(self) -> None:
        for reader in self._files.values():
            reader.close()
        self._files.clear()

    def words(self, node: Node) -> Words:
        """The array's words. Raises ProgramFault or ReplicaConflict where ranks contradict the program."""
        found = self._words(node)
        for leaf in leaves(node):
            self._uses[id(leaf)] = left = self._uses.get(id(leaf), 1) - 1
            if left <= 0:
                self._kept.pop(id(leaf), None)
        return found

    def _words(self, node: Node) -> Words:
        if isinstance(node, Cast):
            return cast_words(self._words(node.source), node.source.dtype, node.dtype)
        if isinstance(node, Mapped):
            return self._mapped(node)
        if id(node) in self._kept:
            return self._kept[id(node)]
        found = self._recorded(node) if isinstance(node, Recorded) else _Gathering(self, node).run()
        if self._uses.get(id(node), 0) > 1:
            self._kept[id(node)] = found
        return found

    def _mapped(self, node: Mapped) -> Words:
        made = np.zeros(prod(node.shape), _word_type(node.dtype))
        for term in node.terms:
            lattice(made, term.extents, term.to)[...] = lattice(self._words(term.source), term.extents, term.at)
        return made

    def _recorded(self, node: Recorded) -> Words:
        if self._opened is None:
            raise AssertionError("a node of a universal checkpoint without one")
        words = np.empty(node.shape, _word_type(node.dtype))
        fetch(self._opened, [Wanted(node.record, Box.whole(node.shape), words, cache="spare")])
        self._read(words.nbytes)
        return words.reshape(-1)

    def stored(self, tensor: StoredTensor) -> NDArray[np.uint8]:
        """The bytes of a tensor in C order."""
        if self._store is None:
            raise AssertionError("a node of files without a store")
        path = tensor.storage.file
        reader = self._files.pop(path, None) or self._store.open_reader(path, cache="spare")
        self._files[path] = reader
        while len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        data = read_tensor(reader, tensor)
        self._read(data.nbytes)
        return data


class _Gathering:
    """One array from the tensors of ranks."""

    def __init__(self, reading: Reading, node: Gathered) -> None:
        self._reading, self._node = reading, node
        self._type = _word_type(node.dtype)
        self._made: Words = np.empty(prod(node.shape), self._type)
        self._first: dict[HeldPiece, str] = {}
        self._digests: set[str] = set()

    def run(self) -> Words:
        node = self._node
        shares = node.shares
        averaged = any(share.agreement == "average" for share in shares)
        if averaged:
            return self._averaged()
        several = node.divided and len({tuple(map(_key, share.pieces)) for share in shares}) > 1
        for share in shares:
            local = self._local(share)
            if several:
                self._digests.add(file_digest(local.tobytes()) if local.size else "")
            for piece in share.pieces:
                if piece.count:
                    self._put(share, piece, local)
        if several and len(self._digests) == 1:
            self._refuse_equal()
        return self._made

    def _local(self, share: Share) -> Words:
        """The words of the local tensor; of one that feeds several arrays only those that go into this one are read."""
        first, stop = _span(share)
        if stop - first < prod(share.shape) and len(share.parts) == 1 and _is_contiguous(share.parts[0][1]):
            stored = share.parts[0][1]
            part = replace(stored, offset=stored.offset + first, shape=(stop - first,), strides=(1,))
            local = np.zeros(prod(share.shape), self._type)
            local[first:stop] = self._reading.stored(part).view(self._type)
        elif len(share.parts) == 1:
            local = self._reading.stored(share.parts[0][1]).view(self._type)
        else:
            whole = np.empty(share.shape, self._type)
            for box, stored in share.parts:
                if box.count:
                    at = tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))
                    whole[at] = self._reading.stored(stored).view(self._type).reshape(box.shape)
            local = whole.reshape(-1)
        return scaled_words(local, self._node.dtype, share.divisor)

    def _put(self, share: Share, piece: HeldPiece, local: Words) -> None:
        into, found = lattice(self._made, piece.extents, piece.whole), lattice(local, piece.extents, piece.local)
        key = _key(piece)
        first = self._first.setdefault(key, share.where)
        if first == share.where:
            into[...] = found
        elif not np.array_equal(into, found):
            self._differs(share, piece, into, found, first)

    def _differs(self, share: Share, piece: HeldPiece, into: Words, found: Words, first: str) -> None:
        at = tuple(int(one[0]) for one in np.nonzero(into != found))
        place = piece.whole.offset + sum(k * s for k, s in zip(at, piece.whole.strides, strict=True))
        index = tuple(int(k) for k in np.unravel_index(place, self._node.shape))
        values = [number(one[at], self._node.dtype) for one in (into, found)]
        said = f"element {index}: {values[0]} in {first}, {values[1]} in {share.where}"
        if share.agreement == "any":
            self._reading.notes.append(f"{share.where} differs from {first} at {said}; the first is kept")
            return
        scope, message = self._node.scope, f"the program says that ranks hold the same, and they do not: {said}"
        raise ReplicaConflict(located(message, at=self._node.rule, source=scope.source, name=scope.name))  # [LANG-20]

    def _refuse_equal(self) -> None:
        share = self._node.shares[0]
        words = self._made
        if prod(share.shape) <= MAX_EQUAL_COUNT or bool((words == words[0]).all()):
            return
        raise self._node.scope.fault(
            f"{share.where}: the program says that ranks hold different parts, and all hold the same: say 'same AXIS' if they "
            "are copies, or 'equal' if it is meant",
            self._node.rule,
        )

    def _averaged(self) -> Words:
        """The mean over workers: in float64, in the order of workers, rounded once."""
        total = np.zeros(self._made.size, np.float64)
        counts: dict[HeldPiece, int] = {}
        for share in self._node.shares:
            local = numbers(self._local(share), self._node.dtype).astype(np.float64)
            for piece in share.pieces:
                lattice(total, piece.extents, piece.whole)[...] += lattice(local, piece.extents, piece.local)
                counts[_key(piece)] = counts.get(_key(piece), 0) + 1
        for piece, count in counts.items():
            lattice(total, piece.extents, piece.whole)[...] /= count
        return as_words(total, self._node.dtype)


def _key(piece: HeldPiece) -> HeldPiece:
    return HeldPiece(piece.extents, piece.whole, Side(0, ()))


def _span(share: Share) -> tuple[int, int]:
    """The elements of the local tensor, in its C order, from the first that is needed to behind the last."""
    needed = [piece for piece in share.pieces if piece.count]
    if not needed:
        return 0, 0
    ends = [p.local.offset + sum((n - 1) * s for n, s in zip(p.extents, p.local.strides, strict=True)) for p in needed]
    return min(piece.local.offset for piece in needed), max(ends) + 1


def _is_contiguous(stored: StoredTensor) -> bool:
    expected = 1
    for extent, stride in zip(reversed(stored.shape), reversed(stored.strides), strict=True):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return True


def lattice(words: NDArray[Any], extents: tuple[int, ...], side: Side) -> NDArray[Any]:
    """A view of flat words: element (k1, k2, ...) is at `side`. Raises AssertionError where it would leave them."""
    last = side.offset + sum((n - 1) * s for n, s in zip(extents, side.strides, strict=True))
    if 0 in extents:
        return np.empty(extents, words.dtype)
    if not 0 <= side.offset <= last < words.size:
        raise AssertionError(f"a lattice {extents} at {side} in {words.size} words")
    strides = tuple(stride * words.itemsize for stride in side.strides)
    return np.ndarray(extents, words.dtype, words.data, side.offset * words.itemsize, strides)


# -- words and numbers -------------------------------------------------------------------------------------------------


def _word_type(dtype: str) -> np.dtype[Any]:
    return np.dtype(_WORDS[dtype_named(dtype).itemsize])


def number_type(dtype: str) -> np.dtype[Any]:
    """numpy's type of that name, or ml_dtypes'."""
    try:
        return np.dtype(dtype)
    except TypeError:
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype))
        return found


def numbers(words: Words, dtype: str) -> NDArray[Any]:
    return words.view(number_type(dtype))


def as_words(values: NDArray[Any], dtype: str) -> Words:
    """Numbers rounded to an element type, as its words."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.ascontiguousarray(values.astype(number_type(dtype)))
    return rounded.reshape(-1).view(_word_type(dtype))


def number(word: Any, dtype: str) -> object:
    """One word as a number, for messages."""
    value: object = np.asarray(word).reshape(1).view(number_type(dtype))[0].item()
    return value


def cast_words(words: Words, source: str, target: str) -> Words:
    """Words of one element type as those of another, rounded as the types round. Raises Unsupported for bools."""
    if "bool" in (source, target) and source != target:
        raise Unsupported(f"a cast from {source} to {target}")
    return words if source == target else as_words(numbers(words, source), target)


def scaled_words(words: Words, dtype: str, divisor: Fraction) -> Words:
    """What the whole has where this is stored divided: exact where the divisor is a power of two, else rounded once."""
    if divisor == 1:
        return words
    values = numbers(words, dtype).astype(np.float64) * divisor.numerator / divisor.denominator
    return as_words(values, dtype)
