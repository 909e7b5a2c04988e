"""Evaluates nodes: reads what they are made of, each tensor once, and puts it together in memory.

An array is words of its element size, flat, in C order: bits, never numbers. At most the array and what goes into it at one
time are in memory. What the files' content shows to be wrong with a program is found here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from elastickpt.convert.buffers import Buffers
from elastickpt.convert.nodes import Cast, Gathered, Mapped, Node, RankPart, Recorded, nbytes_of, visits
from elastickpt.convert.regions import Regions
from elastickpt.convert.sections import direct, of_piece, sections
from elastickpt.convert.words import Words, as_words, cast_into, lattice, number, numbers, scale, word_type
from elastickpt.errors import ReplicaConflict
from elastickpt.foreign.listing import StoredTensor, in_order
from elastickpt.foreign.tensor_bytes import read_tensor, read_tensor_into
from elastickpt.format.arrays import Box
from elastickpt.format.digest import file_digest
from elastickpt.language.faults import located
from elastickpt.language.held import HeldPiece, Strides
from elastickpt.loading.fetch import THREADS, carry_out
from elastickpt.loading.opened import Opened
from elastickpt.loading.plan import plan_fetch
from elastickpt.loading.targets import Wanted
from elastickpt.ranks.threads import Pool
from elastickpt.storage.store import RangeReader, Store

OPEN_FILES = 64
RANGE_NBYTES = 4 << 20  # of one read of several under way
_AVERAGED_COUNT = 1 << 20  # elements of which a mean is made at once
MAX_EQUAL_COUNT = 64  # elements up to which equal shares are taken for chance


class Reading:
    """Reads arrays of one source. `notes` collects what differed and was let pass.

    What it gives lies in `buffers`, and is to be given back there once it is of no more use.
    """

    def __init__(
        self,
        *,
        store: Store | None = None,
        opened: Opened | None = None,
    ) -> None:
        self._store, self._opened = store, opened
        self._files: OrderedDict[str, RangeReader] = OrderedDict()
        self._kept: dict[int, Words] = {}
        self._uses: dict[int, int] = {}
        self._regions = Regions(())
        self._threads: Pool | None = None  # that live as long as this: each has memory of its own
        self.buffers = Buffers()
        self.notes: list[str] = []

    def expect(self, nodes: Iterable[Node]) -> None:
        """These nodes will be evaluated, in any order: leaves that several of them need are kept until the last one."""
        for words in self._kept.values():
            self.buffers.give_back(words)
        self._kept.clear()
        self._uses.clear()
        leaves: dict[int, Gathered | Recorded] = {}
        for node in nodes:
            for leaf in visits(node):
                leaves[id(leaf)] = leaf
                self._uses[id(leaf)] = self._uses.get(id(leaf), 0) + 1
        self._regions = Regions(tuple(leaves.values()))

    def close(self) -> None:
        for reader in self._files.values():
            reader.close()
        self._files.clear()
        if self._threads is not None:
            self._threads.close()
            self._threads = None

    def words(self, node: Node, phase: int = 0) -> Words:
        """The array's words, in memory that begins `phase` bytes behind a page's begin where that is possible.

        Raises ProgramFault or ReplicaConflict where ranks contradict the program.
        """
        if isinstance(node, Cast):
            source, made = self.words(node.source), self.take(node, phase)
            cast_into(made, node.dtype, source, node.source.dtype)
            self.buffers.give_back(source)
            return made
        if isinstance(node, Mapped):
            return self._mapped(node, phase)
        return self._leaf(node, phase)

    def _leaf(self, node: Gathered | Recorded, phase: int) -> Words:
        """A leaf is read when it is first needed, and kept as long as it was announced that it will be needed once more."""
        found = self._kept.pop(id(node), None)
        if found is None:
            found = self._recorded(node, phase) if isinstance(node, Recorded) else _Gathering(self, node, phase).run()
            self._regions.done(node)
        left = self._uses.get(id(node), 1) - 1
        self._uses[id(node)] = left
        if left > 0:
            self._kept[id(node)] = found
            self.buffers.hold(found)
        return found

    def _mapped(self, node: Mapped, phase: int) -> Words:
        made = self.take(node, phase)
        made[...] = 0
        for source in node.sources:
            words = self.words(source)
            for term in node.terms:
                if term.source is source:
                    lattice(made, term.extents, term.to)[...] = lattice(words, term.extents, term.at)
            self.buffers.give_back(words)
        return made

    def take(self, node: Node, phase: int = 0) -> Words:
        """Memory for an array."""
        return self.buffers.take(nbytes_of(node), phase).view(word_type(node.dtype))

    def _recorded(self, node: Recorded, phase: int) -> Words:
        if self._opened is None:
            raise AssertionError("a node of a universal checkpoint without one")
        words = self.take(node, phase)
        wanted = Wanted(node.record, Box.whole(node.shape), words.reshape(node.shape), cache="spare")
        carry_out(self._opened, plan_fetch(self._opened, [wanted]), threads=self._pool())
        return words

    def _pool(self) -> Pool:
        if self._threads is None:
            self._threads = Pool("elastickpt-read", THREADS)
        return self._threads

    def stored(self, tensor: StoredTensor) -> NDArray[np.uint8]:
        """The bytes of a small tensor in C order, in memory of their own."""
        return read_tensor(self._reader(tensor), tensor)

    def fill(self, made: Words, tensor: StoredTensor) -> None:
        """Fills words with a tensor's, in C order."""
        reader, data = self._reader(tensor), made.view(np.uint8)
        if tensor.contiguous and data.size > RANGE_NBYTES:
            ranges = range(0, data.size, RANGE_NBYTES)
            parts = [(tensor.start + at, data[at : at + RANGE_NBYTES].data) for at in ranges]
            self._pool().share_out(parts, lambda part: reader.read_into(*part))
        else:
            read_tensor_into(reader, tensor, data)

    def _reader(self, tensor: StoredTensor) -> RangeReader:
        if self._store is None:
            raise AssertionError("a node of files without a store")
        path = tensor.storage.file
        reader = self._files.pop(path, None) or self._store.open_reader(path, cache="spare")
        self._files[path] = reader
        while len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return self._regions.reader(path, reader)


class _Gathering:
    """One array from the tensors of ranks."""

    def __init__(self, reading: Reading, node: Gathered, phase: int) -> None:
        self._reading, self._node = reading, node
        self._type = word_type(node.dtype)
        self._made = reading.take(node, phase)
        self._first: dict[HeldPiece, str] = {}
        self._digests: set[str] = set()

    def run(self) -> Words:
        node = self._node
        shares = node.shares
        if any(share.agreement == "average" for share in shares):
            return self._averaged()
        several = node.divided and len({tuple(map(_key, share.pieces)) for share in shares}) > 1
        for share in shares:
            self._add(share, several=several)
        if several and len(self._digests) == 1:
            self._refuse_equal()
        return self._made

    def _add(self, share: RankPart, *, several: bool) -> None:
        digests = []
        for section in sections(share):
            place = self._place(section)
            local = self._local(section) if place is None else self._made[place]
            if place is not None:  # it lies there as here, and nobody has filled it
                self._fill(section, local)
                self._first[_key(section.pieces[0])] = section.where
            if several:
                digests.append(file_digest(local.view(np.uint8).data) if local.size else "")
            if place is None:
                for piece in section.pieces:
                    if piece.count:
                        self._put(section, piece, local)
                self._reading.buffers.give_back(local)
        if several:
            self._digests.add(" ".join(digests))

    def _place(self, section: RankPart) -> slice | None:
        """Where the array has the section's words as they are, end to end; None where it has not, or has them already."""
        if len(section.pieces) != 1:
            return None
        (piece,) = section.pieces
        alike = all(in_order(piece.extents, side.strides) for side in (piece.whole, piece.local))
        if not alike or piece.local.offset or piece.count != prod(section.shape) or _key(piece) in self._first:
            return None
        return slice(piece.whole.offset, piece.whole.offset + piece.count)

    def _local(self, section: RankPart) -> Words:
        local = self._take(prod(section.shape))
        self._fill(section, local)
        return local

    def _take(self, count: int) -> Words:
        return self._reading.buffers.take(count * self._type.itemsize).view(self._type)

    def _fill(self, share: RankPart, into: Words) -> None:
        """All words of the local tensor."""
        if len(share.parts) == 1:
            self._reading.fill(into, share.parts[0][1])
        else:
            whole = into.reshape(share.shape)
            for box, stored in share.parts:
                if not box.count:
                    continue
                at = whole[tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))]
                if at.flags.c_contiguous:
                    self._reading.fill(at.reshape(-1), stored)
                    continue
                part = self._take(box.count)
                self._reading.fill(part, stored)
                at[...] = part.reshape(box.shape)
                self._reading.buffers.give_back(part)
        scale(into, self._node.dtype, share.divisor)

    def _put(self, share: RankPart, piece: HeldPiece, local: Words) -> None:
        into, found = lattice(self._made, piece.extents, piece.whole), lattice(local, piece.extents, piece.local)
        first = self._first.setdefault(_key(piece), share.where)
        if first == share.where:
            into[...] = found
        elif not np.array_equal(into, found):
            self._differs(share, piece, into, found, first)

    def _differs(self, share: RankPart, piece: HeldPiece, into: Words, found: Words, first: str) -> None:
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
        """The mean over workers: in float64, in the order of workers, rounded once; some elements at a time."""
        held: dict[HeldPiece, list[tuple[RankPart, HeldPiece]]] = {}
        for share in self._node.shares:
            for section in sections(share):
                for piece in section.pieces:
                    if piece.count:
                        held.setdefault(_key(piece), []).append((section, piece))
        for of_one in held.values():
            workers = dict.fromkeys(share.worker for share, _ in of_one)
            in_order = [(share, piece) for worker in workers for share, piece in of_one if share.worker == worker]
            step = _AVERAGED_COUNT if all(direct(share) for share, _ in in_order) else in_order[0][1].count
            for parts in zip(*(list(_cut(piece, step)) for _, piece in in_order), strict=True):
                self._average([(share, part) for (share, _), part in zip(in_order, parts, strict=True)], len(workers))
        return self._made

    def _average(self, held: Sequence[tuple[RankPart, HeldPiece]], workers: int) -> None:
        """The mean of one piece; what several ranks hold of one worker is compared."""
        first = held[0][1]
        total = np.zeros(first.count, np.float64)
        before: tuple[RankPart, Words] | None = None
        for share, piece in held:
            found = self._of_piece(share, piece)
            if before is None or before[0].worker != share.worker:
                total += numbers(found, self._node.dtype).astype(np.float64)
            elif not np.array_equal(before[1], found):
                shape = (before[1].reshape(piece.extents), found.reshape(piece.extents))
                self._differs(share, piece, *shape, before[0].where)
            if before is not None:
                self._reading.buffers.give_back(before[1])
            before = (share, found)
        if before is not None:
            self._reading.buffers.give_back(before[1])
        made = as_words(total / workers, self._node.dtype).reshape(first.extents)
        lattice(self._made, first.extents, first.whole)[...] = made

    def _of_piece(self, share: RankPart, piece: HeldPiece) -> Words:
        """The elements of a piece, in the order of its digits."""
        words = self._take(piece.count)
        if direct(share):
            self._reading.fill(words, of_piece(share, piece))
            scale(words, self._node.dtype, share.divisor)
            return words
        local = self._local(share)
        words.reshape(piece.extents)[...] = lattice(local, piece.extents, piece.local)
        self._reading.buffers.give_back(local)
        return words


def _key(piece: HeldPiece) -> HeldPiece:
    return HeldPiece(piece.extents, piece.whole, Strides(0, ()))


def _cut(piece: HeldPiece, count: int) -> Iterator[HeldPiece]:
    """Parts of at most so many elements, along the digits that go furthest in the local tensor."""
    if piece.count <= count:
        yield piece
        return
    along = max((k for k, n in enumerate(piece.extents) if n > 1), key=lambda k: piece.local.strides[k])
    step = max(1, count // (piece.count // piece.extents[along]))
    for start in range(0, piece.extents[along], step):
        extents = (*piece.extents[:along], min(step, piece.extents[along] - start), *piece.extents[along + 1 :])
        whole, local = (replace(s, offset=s.offset + start * s.strides[along]) for s in (piece.whole, piece.local))
        yield from _cut(HeldPiece(extents, whole, local, piece.axes), count)
