"""What ranks tell each other about a save, and what follows from all of it."""

from __future__ import annotations

from collections.abc import Sequence

from elastickpt.commit.attempt import Attempt
from elastickpt.errors import Refused, StructureConflict
from elastickpt.format.digest import file_digest
from elastickpt.format.records import FileDigest
from elastickpt.ranks.messages import Message, encode


class Intention(Message, frozen=True):
    """What one rank is about to save: where, and digests of its structure and of each replicated value.

    `known` are structures of whole jobs for which this rank still has its plan. `staged` is the one by whose plan it has
    staged already, "" if it has not; `seated`: its writer knows where the others meet. `hashed` is the one by which it knew
    what to compare with other ranks, "" if it knew none, and `replicas` what it found, as `drift.Hashed.summary` has it.
    """

    target: tuple[str, str]  # store URL, name
    step: int | None
    options: tuple[str, ...]  # placement, durability, what is looked at of replicas
    table: str
    values: tuple[tuple[str, str], ...]  # JSON pointer, digest
    known: tuple[str, ...]
    staged: str = ""
    seated: bool = True
    hashed: str = ""
    replicas: tuple[tuple[int, int], ...] = ()


TypedValues = tuple[tuple[str, str], ...]  # by JSON pointer, as typed JSON text


class OpenedAttempt(Message, frozen=True):
    """What a member is told of the attempt that member 0 opened: the replicated values `wanted` of it, and whether any are
    wanted of others than member 0."""

    attempt: Attempt
    wanted: tuple[str, ...]
    gathers: bool


class Next(Message, frozen=True):
    """What member 0 says once it knows all intentions. `sends`: this member sends its table along; `differing` are pointers
    of values of which members hold different parts; `opened` is what it opened at once, None if there is more to ask.
    `compared`: replicas were, as all had hashed them by this structure, and differ in the looks `drifted`."""

    structure: str
    known: bool
    sends: bool
    differing: tuple[str, ...]
    seats: bool
    compared: bool
    drifted: tuple[int, ...]
    opened: OpenedAttempt | None


class Attested(Message, frozen=True):
    """What one rank wrote: its fragment file, and the replicated values asked of it as typed JSON text."""

    file: FileDigest
    values: TypedValues


def structure_id(ranks: Sequence[int], tables: Sequence[str]) -> str:
    """Identifies the structure of a whole job: which rank has which table."""
    return file_digest(encode((tuple(ranks), tuple(tables))))


def require_same_intention(intentions: Sequence[Intention], ranks: Sequence[int]) -> None:
    """Raises Refused if ranks mean different saves."""
    first = intentions[0]
    for rank, other in zip(ranks[1:], intentions[1:], strict=True):
        for what in ("target", "step", "options"):
            mine, theirs = getattr(first, what), getattr(other, what)
            if mine != theirs:
                raise Refused(
                    f"{what} of this save: expected the same on all ranks, "
                    f"found {mine} on rank {ranks[0]} and {theirs} on rank {rank}"
                )


def require_staged_alike(intentions: Sequence[Intention], ranks: Sequence[int], structure: str) -> None:
    """Raises StructureConflict if a rank staged by the plan of another structure of the job than the one that it has now."""
    stale = [rank for rank, one in zip(ranks, intentions, strict=True) if one.staged not in ("", structure)]
    if stale:
        changed = [rank for rank, one in zip(ranks, intentions, strict=True) if not one.staged]
        who = f"that of ranks {changed} changed" if changed else "ranks do not go by the same one"
        raise StructureConflict(
            f"structure of the job: {who}, after ranks {stale} had staged by the one that they knew; "
            "this save is given up, the next one goes by the new structure"
        )


def differing_values(intentions: Sequence[Intention]) -> tuple[str, ...]:
    """JSON pointers of values that two ranks hold differently, and so of optimizer tables."""
    seen: dict[str, str] = {}
    differing: dict[str, None] = {}
    for intention in intentions:
        for pointer, digest in intention.values:
            if seen.setdefault(pointer, digest) != digest:
                differing[pointer] = None
    return tuple(differing)


def values_wanted(intentions: Sequence[Intention]) -> tuple[tuple[str, ...], ...]:
    """By member: the replicated values that it sends along; each value is asked of the first member that has it."""
    taken: set[str] = set()
    wanted = []
    for intention in intentions:
        mine = tuple(
            pointer for pointer, _ in intention.values if pointer not in taken and not pointer.startswith(TABLE_PREFIX)
        )
        taken.update(mine)
        wanted.append(mine)
    return tuple(wanted)


TABLE_PREFIX = "optimizer tables of "  # not a JSON pointer: compared like a value, but carried in fragment files
