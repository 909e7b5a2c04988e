"""Whether what ranks hold alike is still alike: digests of replicas, compared between ranks before anything is committed.

[SAVE-67, SAVE-68, SAVE-69, SAVE-70]

prepare     each rank that knows the structure: one digest for each set of ranks with which it holds arrays alike
replicas    else: the same, once the structure is known
drift       only if a set's digests differ: one for each array of such sets

What is looked at (`DriftKind`), and what comes of a difference:

    inferred   nobody declares these ranks to hold the same    every save                   refused
    loose      buffers that nobody keeps equal                 every save                   noted
    declared   whatever else is declared                       replicas="verify"            refused
    broadcast  buffers that DDP gives everybody                replicas="verify"            noted
    sampled    a share of declared and broadcast               replicas="sample"            noted

So member 0 hears a few numbers from each rank, however many parameters there are, as long as nothing drifted.

Host memory is hashed at once, by xxh3-128; a device computes a digest of its own beside what it computes
(`training.device`), so that nothing but the digest leaves it:

    digests = Digests()
    digests.add(tensor, first, last)   # for each; reads host memory, gives the device its work
    digests.found()                    # waits for the device: one digest for each, in their order

Equal contents have equal digests of one kind; the two kinds never agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Literal

from xxhash import xxh3_128

from elastickpt.errors import ReplicaConflict
from elastickpt.format.arrays import ArrayId, Box
from elastickpt.format.digest import block_checksum
from elastickpt.format.memory_views import bytes_at
from elastickpt.format.version import MIB
from elastickpt.ranks.messages import Message, encode
from elastickpt.ranks.team import Question, Team
from elastickpt.saving.merge import SharedArray
from elastickpt.saving.plan import replicas_of
from elastickpt.saving.request import SHARES, Request
from elastickpt.saving.staging import range_digest
from elastickpt.training.device import device_digest, on_the_way
from elastickpt.training.elements import host_address, host_elements
from elastickpt.training.held import HeldArray

if TYPE_CHECKING:
    import torch


class Digests:
    """Digests of ranges of tensors, in the order in which they were added."""

    def __init__(self) -> None:
        self._found: list[bytes | int] = []  # or the number of a device's one
        self._on_device: list[torch.Tensor] = []
        self._copied: Callable[[], Sequence[Sequence[int]]] | None = None

    def add(self, tensor: torch.Tensor, first: int, last: int) -> None:
        """Elements [first, last) of a tensor in C order, whatever its strides, as they are once all work given to the current
        stream so far is done. Blocking for a pass over host memory; not for a device."""
        if tensor.device.type == "cpu":
            self._found.append(host_digest(tensor, first, last))
        else:
            self._found.append(len(self._on_device))
            self._on_device.append(device_digest(tensor.detach().reshape(-1)[first:last]))

    def close(self) -> None:
        """No more are added: the device's digests are on their way to the host. Not blocking."""
        if self._on_device:
            self._copied, self._on_device = on_the_way(self._on_device), []

    def found(self) -> tuple[bytes, ...]:
        """One for each range. Blocking until the device has them."""
        self.close()
        rows = [] if self._copied is None else self._copied()
        return tuple(_device_bytes(rows[one]) if isinstance(one, int) else one for one in self._found)


def host_digest(tensor: torch.Tensor, first: int, last: int) -> bytes:
    """Of a tensor in host memory: xxh3-128 of its elements [first, last) in C order, whatever the strides."""
    address, itemsize = host_address(tensor), tensor.element_size()
    if address is None or first == last:
        return range_digest(host_elements(tensor), first, last)
    return xxh3_128(bytes_at(address + first * itemsize, (last - first) * itemsize, tensor).data).digest()


def _device_bytes(sums: Sequence[int]) -> bytes:
    """Longer than a host's, so that the two kinds differ."""
    return b"device " + b"".join(one.to_bytes(8, "little", signed=True) for one in sums)


DriftKind = Literal["inferred", "loose", "declared", "broadcast", "sampled"]
NAMED = 8  # arrays in one message; there may be as many as the model has
SLICED_NBYTES = MIB  # of what is smaller a share of the arrays is looked at, not a share of each


@dataclass(frozen=True, slots=True)
class Look:
    """Arrays, by their numbers, whose contents this rank compares with the other ranks that have a look with this `key`."""

    why: DriftKind
    key: int
    arrays: tuple[int, ...]


class ArrayDigest(Message, frozen=True):
    """The digest of what one rank holds of one array, in a look."""

    key: int
    why: DriftKind
    array: ArrayId
    box: Box
    digest: bytes


Summary = tuple[tuple[int, int], ...]  # the key of each look, and a checksum of its digests

REPLICAS = Question("replicas", Summary, tuple[int, ...])
DRIFT = Question("drift", tuple[ArrayDigest, ...], NoneType)


def looks_of(arrays: Sequence[HeldArray], shared: Sequence[SharedArray], *, rank: int) -> tuple[Look, ...]:
    """What `rank` compares in every save; `shared[i]` belongs to `arrays[i]`.

    A set of ranks that is declared to hold the same is trusted to: where several such sets hold one array, the first rank of
    each speaks for it. Ranks that hold the same box of an array have a look with the same key.
    """
    found: dict[tuple[object, ...], list[int]] = {}
    if not any(len(fact.peers) > 1 or held.kept == "loose" for held, fact in zip(arrays, shared, strict=True)):
        return ()
    for number, held, ranks in _ordered(arrays, shared, rank):
        peers = shared[number].peers
        if len(peers) > 1 and (held.sharing == "undeclared" or ranks[0] == rank):
            found.setdefault(("inferred", peers, held.placements, _coordinate(held, rank)), []).append(number)
        if held.kept == "loose" and len(ranks) > 1:
            found.setdefault(("loose", ranks), []).append(number)
    return _looks(found)


def looks_asked_for(
    arrays: Sequence[HeldArray], shared: Sequence[SharedArray], request: Request, *, rank: int
) -> tuple[Look, ...]:
    """What it compares beside that because the caller wants replicas to be looked at that are declared."""
    if not request.compares_replicas:
        return ()
    found: dict[tuple[object, ...], list[int]] = {}
    for number, held, ranks in _ordered(arrays, shared, rank):
        if len(ranks) > 1 and held.sharing != "undeclared" and held.kept != "loose":
            verified = "broadcast" if held.kept == "broadcast" else "declared"
            found.setdefault(("sampled" if request.replicas == "sample" else verified, ranks), []).append(number)
    return _looks(found)


def _ordered(
    arrays: Sequence[HeldArray], shared: Sequence[SharedArray], rank: int
) -> Iterator[tuple[int, HeldArray, tuple[int, ...]]]:
    """Arrays of which it holds something, in the order of their ids, with the ranks known to hold the same."""
    groups = replicas_of(arrays, shared, rank=rank)
    for number in sorted(range(len(arrays)), key=lambda number: arrays[number].spec.id):
        if arrays[number].box.count:
            yield number, arrays[number], groups[number]


def _coordinate(held: HeldArray, rank: int) -> tuple[int, ...]:
    """Where it stands on those axes of its mesh that cut the array."""
    if held.mesh is None:
        return ()
    at = zip(held.mesh.coordinate(rank), held.placements, strict=True)
    return tuple(index for index, placement in at if placement != "R")


def _looks(found: Mapping[tuple[object, ...], list[int]]) -> tuple[Look, ...]:
    return tuple(
        Look(kind[0], block_checksum(encode(kind)), tuple(numbers))  # type: ignore[arg-type]
        for kind, numbers in found.items()
    )


class Hashed:
    """What a rank holds of what it looks at, as digests; of the structure of the job `structure`. Keeps no tensor."""

    def __init__(self, structure: str, looks: Iterable[Look], arrays: Sequence[HeldArray], *, share: int) -> None:
        """Blocking for a pass over host memory; a device goes on by itself (`Digests`)."""
        self.structure = structure
        self._digests = Digests()
        self._rows: list[tuple[Look, list[tuple[ArrayId, Box]]]] = []
        for look in looks:
            named = []
            for number in look.arrays:
                held = arrays[number]
                first, last = _part(held, share) if look.why == "sampled" else (0, held.box.count)
                if first < last:
                    self._digests.add(held.tensor, first, last)
                    named.append((held.spec.id, held.box))
            if named:
                self._rows.append((look, named))
        self._digests.close()

    def rows(self) -> list[ArrayDigest]:
        """One for each array and look. Blocking until a device has hashed."""
        digests = iter(self._digests.found())
        return [ArrayDigest(look.key, look.why, *one, next(digests)) for look, named in self._rows for one in named]

    def summary(self) -> Summary:
        """Blocking likewise."""
        digests = iter(self._digests.found())
        return tuple((look.key, block_checksum(b"".join([next(digests) for _ in named]))) for look, named in self._rows)


def differing_keys(summaries: Iterable[Sequence[tuple[int, int]]]) -> tuple[int, ...]:
    """Keys of the looks in which two ranks found different contents, or not the same arrays."""
    seen: dict[int, int] = {}
    differing: set[int] = set()
    for summary in summaries:
        for key, checksum in summary:
            if seen.setdefault(key, checksum) != checksum:
                differing.add(key)
    return tuple(sorted(differing))


def compare_sets(team: Team, hashed: Hashed) -> tuple[int, ...]:
    """`differing_keys` of all ranks, in a round; blocking."""
    return REPLICAS.ask(team, hashed.summary, differing_keys)


def name_drift(team: Team, hashed: Hashed, keys: Sequence[int]) -> tuple[str, ...]:
    """What drifted in the looks with these keys; blocking, one round. Member 0 returns notes.

    Raises ReplicaConflict, the same on all ranks, if something differs that must not. [SAVE-67]
    """
    notes: list[str] = []

    def own() -> tuple[ArrayDigest, ...]:
        return tuple(row for row in hashed.rows() if row.key in keys)

    def judge(rows: Sequence[tuple[ArrayDigest, ...]]) -> None:
        found = drifted(dict(zip(team.ranks, rows, strict=True)))
        if refused := [_REFUSED[why].format(_listed(names)) for why, names in found.items() if why in _REFUSED]:
            raise ReplicaConflict(f"{'; '.join(refused)}; nothing was saved")
        notes.extend(_NOTED[why].format(_listed(names)) for why, names in found.items())

    DRIFT.ask(team, own, judge)
    return tuple(notes)


_REFUSED: Mapping[DriftKind, str] = {
    "inferred": "{}; nothing declares these to be replicas: pass mesh= if they are and need not be compared, give different "
    "tensors different names, or wrap what is a rank's own in ek.PerRank",
    "declared": "replicas differ: expected the same contents, found others: {}; this save verifies its replicas",
}
_NOTED: Mapping[DriftKind, str] = {
    "loose": "buffers differ between ranks: {}; of each the first rank's was saved",
    "broadcast": "buffers differ between ranks: {}; of each the first rank's was saved, as DDP gives it to all in a forward",
    "sampled": "replicas differ: expected the same contents, found others: {}; saved all the same: each byte as the rank has "
    "it that writes it",
}


def drifted(by_rank: Mapping[int, Sequence[ArrayDigest]]) -> dict[DriftKind, list[str]]:
    """What is not alike: arrays with their boxes, and which ranks still agree with each other."""
    digests_of: dict[tuple[DriftKind, int, ArrayId, Box], dict[bytes, list[int]]] = {}
    for rank, rows in by_rank.items():
        for row in rows:
            digests_of.setdefault((row.why, row.key, row.array, row.box), {}).setdefault(row.digest, []).append(rank)
    found: dict[DriftKind, list[str]] = {}
    for (why, _, array, box), holders in sorted(digests_of.items(), key=lambda one: (one[0][0], one[0][2], one[0][3].start)):
        if len(holders) > 1:
            where = f"{box} on ranks {' and '.join(map(str, holders.values()))}"
            one, other = list(holders.values())[:2]
            conflict = f"array {array}: ranks {one[0]} and {other[0]} hold different contents under this name ({where})"
            found.setdefault(why, []).append(conflict if why == "inferred" else f"{array} {where}")
    return found


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def _part(held: HeldArray, share: int) -> tuple[int, int]:
    """Which elements of a rank's local tensor a sample looks at, counted in C order."""
    count = held.box.count
    if count * held.spec.type.itemsize < SLICED_NBYTES:
        return (0, count) if (block_checksum(str(held.spec.id).encode()) + share) % SHARES == 0 else (0, 0)
    return count * share // SHARES, count * (share + 1) // SHARES
