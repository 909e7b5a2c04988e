"""Whether what ranks hold alike is still alike: digests of replicas, compared between ranks before anything is written.

[SAVE-67, SAVE-68]

replicas    each rank: one digest for each set of ranks with which it holds arrays alike
drift       only if a set's digests differ: one for each array of such sets

So member 0 hears a few numbers from each rank, however many parameters there are, as long as nothing drifted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgpack

from elastickpt.comms.team import Team
from elastickpt.errors import ReplicaConflict
from elastickpt.format.arrays import ArrayId
from elastickpt.format.box import Box
from elastickpt.format.digest import block_checksum, file_digest
from elastickpt.format.limits import MIB
from elastickpt.save.gather import range_digest
from elastickpt.save.merge import SharedArray
from elastickpt.save.messages import ContentDigest, decode_digests, encode_digests
from elastickpt.save.plan import replicas_of
from elastickpt.save.request import SHARES, Request
from elastickpt.training.held import HeldArray
from elastickpt.training.memory import host_range

NAMED = 8  # arrays in one message; there may be as many as the model has
SLICED_NBYTES = MIB  # of what is smaller a share of the arrays is looked at, not a share of each


@dataclass(frozen=True, slots=True)
class ReplicaSet:
    """What one rank holds alike with others: `digests` of those arrays, in the order of their ids; `key` is the same on all
    ranks of the set, and on no others."""

    key: int
    digests: tuple[ContentDigest, ...]

    @property
    def digest(self) -> str:
        """Of all of them."""
        return file_digest("".join(one.digest for one in self.digests).encode())


def replica_sets(
    arrays: Sequence[HeldArray], shared: Sequence[SharedArray], request: Request, *, rank: int
) -> tuple[ReplicaSet, ...]:
    """Digests of the parameters, and of their optimizer state, that `rank` holds alike with other ranks: of all their bytes,
    or of the share that a sample looks at. `shared[i]` belongs to `arrays[i]`. Blocking, for a pass over that memory."""
    share = None if request.replicas == "verify" else request.share
    by_ranks: dict[tuple[int, ...], list[ContentDigest]] = {}
    groups = replicas_of(arrays, shared, rank=rank)
    for held, ranks in sorted(zip(arrays, groups, strict=True), key=lambda pair: pair[0].spec.id):
        if len(ranks) < 2 or held.role != "parameter" or held.box.count == 0:
            continue
        first, last = _part(held, share)
        if first < last:
            digest = range_digest(*host_range(held.tensor, first, last))
            by_ranks.setdefault(ranks, []).append(ContentDigest(held.spec.id, held.box, digest))
    return tuple(ReplicaSet(_key(ranks), tuple(digests)) for ranks, digests in by_ranks.items())


def require_alike(team: Team, request: Request, sets: Callable[[], Sequence[ReplicaSet]]) -> tuple[str, ...]:
    """Compares replicas between all ranks; blocking, one or two rounds. `sets` is called within the first one.

    Raises ReplicaConflict, the same on all ranks, if some differ and are to be verified; of a sample member 0 returns what to
    say of it.
    """
    found: list[ReplicaSet] = []

    def digests() -> bytes:
        found.extend(sets())
        return bytes(msgpack.packb([(one.key, one.digest) for one in found]))

    def differing(payloads: Sequence[bytes]) -> Sequence[bytes]:
        seen: dict[int, str] = {}
        keys: set[int] = set()
        for payload in payloads:
            for key, digest in msgpack.unpackb(payload):
                if seen.setdefault(key, digest) != digest:
                    keys.add(key)
        return [bytes(msgpack.packb(sorted(keys)))] * len(payloads)

    keys = frozenset(msgpack.unpackb(team.round("replicas", digests, differing)))
    if not keys:
        return ()
    notes: list[str] = []

    def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
        drift = drifted({rank: decode_digests(data) for rank, data in zip(team.ranks, payloads, strict=True)})
        if request.replicas == "verify":
            raise ReplicaConflict(f"{drift}; nothing was saved, as this save verifies its replicas")
        notes.append(f"{drift}; saved all the same: each byte as the rank has it that writes it")
        return [b""] * len(payloads)

    team.round("drift", lambda: encode_digests([d for one in found if one.key in keys for d in one.digests]), decide)
    return tuple(notes)


def drifted(by_rank: Mapping[int, Sequence[ContentDigest]]) -> str:
    """What is not alike, of digests by rank: names, boxes, and which ranks still agree with each other."""
    ways: dict[tuple[ArrayId, Box], dict[str, list[int]]] = {}
    for rank, digests in by_rank.items():
        for one in digests:
            ways.setdefault((one.array, one.box), {}).setdefault(one.digest, []).append(rank)
    named = [
        f"{identity} {box} on ranks {' and '.join(str(ranks) for ranks in found.values())}"
        for (identity, box), found in sorted(ways.items(), key=lambda way: (way[0][0], way[0][1].start))
        if len(found) > 1
    ]
    more = f", and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return f"replicas differ: expected the same contents, found others: {', '.join(named[:NAMED])}{more}"


def _part(held: HeldArray, share: int | None) -> tuple[int, int]:
    """Which elements of a rank's local tensor are looked at, counted in C order; None stands for all shares."""
    count = held.box.count
    if share is None:
        return 0, count
    if count * held.spec.type.itemsize < SLICED_NBYTES:
        return (0, count) if (block_checksum(str(held.spec.id).encode()) + share) % SHARES == 0 else (0, 0)
    return count * share // SHARES, count * (share + 1) // SHARES


def _key(ranks: tuple[int, ...]) -> int:
    return block_checksum(bytes(msgpack.packb(ranks)))
