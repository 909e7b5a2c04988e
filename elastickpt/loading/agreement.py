"""What ranks tell each other in the rounds of a load, and what follows from all of it: also whether they hold now what the
ranks that saved held, as far as both sides have the same models.

Of arrays that are one tensor in this process only one is taken; the contents of the others are read to see that they are the
same. Values of a rank's own (random streams, loaders, per-rank states) go back to the ranks that had them only where all hold
what they held.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from elastickpt.errors import Refused
from elastickpt.format.arrays import ArrayId, id_key
from elastickpt.loading.fetch import Verify, carry_out
from elastickpt.loading.opened import Opened, is_converted
from elastickpt.loading.plan import plan_fetch, require_files
from elastickpt.loading.targets import AnyArray, Wanted
from elastickpt.ranks.messages import Message
from elastickpt.training.held import HeldArray
from elastickpt.training.listing import Binding, Listing, Mismatch, unexpected


def lies_as_saved(opened: Opened, held: Sequence[HeldArray]) -> bool:
    """Whether meshes and placements of a rank that holds `held` of models are the writers': those of the arrays that both sides
    have; where there are none, the meshes at least."""
    manifest = opened.manifest
    if is_converted(opened):  # no rank stood anywhere
        return False
    columns = opened.arrays
    places = [columns.by_id.get(id_key(array.spec.id), -1) for array in held]
    if max(places, default=-1) < 0:
        return {array.mesh for array in held} <= {None, *manifest.meshes}
    layouts = [columns.templates[number].layout for number in columns.template[places].tolist()]
    seen = set[tuple[int, tuple[str, ...], int | None]]()  # meshes by identity: few, and compared name by name
    for array, place, number in zip(held, places, layouts, strict=True):
        if place < 0 or (found := (id(array.mesh), array.placements, number)) in seen:
            continue
        layout = None if number is None else manifest.layouts[number]
        saved = (None, ()) if layout is None else (manifest.meshes[layout.mesh], layout.placements)
        if (array.mesh, array.placements) != saved:
            return False
        seen.add(found)
    return True


def lacking_of(opened: Opened, ids: Collection[ArrayId], writer: int) -> Iterator[ArrayId]:
    """Parameters and buffers of which `writer` stored something, and a rank that holds `ids` has nothing, of models that it
    has."""
    items = {identity.item for identity in ids} & {item.name for item in opened.manifest.items if item.kind == "module"}
    for identity in opened.stored_by(writer, items) if items else ():
        if identity.section == "params" and identity.state == "value" and identity not in ids:
            yield identity


SHOWN_MISMATCHES = 20
BESIDE = "beside"  # what a converted checkpoint has and a job need not
MASTER = "master"


class Meant(Message, frozen=True):
    """Which load a rank means: `path` as it was given there, the attempt that it found, the mode. `same`: this rank holds what
    the writer of its number held, but for the arrays `lacking`."""

    path: str
    attempt: str
    strict: str
    same: bool
    lacking: tuple[str, ...]


class Opening(Message, frozen=True):
    """Whether every rank holds what the writer of its number held, and what some rank lacks of that."""

    same: bool
    lacking: tuple[str, ...]


def require_same_load(meant: Sequence[Meant], ranks: Sequence[int]) -> Opening:
    """Raises Refused if ranks mean different loads; paths may differ where one checkpoint has several."""
    first = meant[0]
    for rank, other in zip(ranks[1:], meant[1:], strict=True):
        for what, one, two in (
            ("checkpoint", f"attempt {first.attempt}", f"attempt {other.attempt}"),
            ("strict mode", first.strict, other.strict),
        ):
            if one != two:
                raise Refused(
                    f"{what} of this load: expected the same on all ranks, "
                    f"found {one} ({first.path}) on rank {ranks[0]} and {two} ({other.path}) on rank {rank}"
                )
    return Opening(all(one.same for one in meant), tuple(sorted({name for one in meant for name in one.lacking})))


class Differences(Message, frozen=True):
    """What differs on one rank, and which of the checkpoint's arrays (a bit each, in index order) and values it has a place
    for: only all ranks together know what nobody has a place for."""

    mismatches: tuple[Mismatch, ...]
    arrays: bytes
    places: tuple[str, ...]


def differences_of(opened: Opened, binding: Binding) -> Differences:
    """What this rank tells of what it bound."""
    known = np.zeros(len(opened.arrays), dtype=np.bool_)
    by_id = opened.arrays.by_id
    known[[place for one in binding.arrays if (place := by_id.get(id_key(one))) is not None]] = True
    for many in binding.columns:
        known[many.places] = True
    return Differences(tuple(binding.mismatches), np.packbits(known).tobytes(), tuple(sorted(binding.places)))


def joint_mismatches(
    opened: Opened, listing: Listing, told: Sequence[Differences], ranks: Sequence[int]
) -> list[tuple[str, str]]:
    """(what, text) of every difference on any rank, each once, with the ranks that have it.

    `what` is "beside" for what a converted checkpoint has beyond a job's state: that is no difference. [UCF-120]
    """
    where: dict[Mismatch, list[int]] = {}
    union = np.zeros(-(-len(opened.arrays) // 8), dtype=np.uint8)
    places: set[str] = set()
    for rank, own in zip(ranks, told, strict=True):
        for mismatch in own.mismatches:
            where.setdefault(mismatch, []).append(rank)
        union |= np.frombuffer(own.arrays, dtype=np.uint8)
        places.update(own.places)
    flags = np.unpackbits(union, count=len(opened.arrays)).astype(bool)
    arrays = None
    if not flags.all() or is_converted(opened):
        arrays = [identity for identity, known in zip(opened.records, flags.tolist(), strict=True) if known]
    found: list[tuple[str, str]] = []
    for mismatch, on in sorted(where.items()):
        found.append((mismatch.what, f"{mismatch} on {_ranks_text(on, ranks)}"))
    beside = _Beside(opened, arrays or (), places)
    more = unexpected(listing, arrays=arrays, places=places)
    found.extend((BESIDE if beside.has(mismatch) else mismatch.what, str(mismatch)) for mismatch in more)
    masters = [one for one in opened.records if one.state == MASTER] if is_converted(opened) else []
    found.extend((BESIDE, f"{one}: a master, whose parameter's value is loaded") for one in masters)
    return found


class _Beside:
    """What a converted checkpoint has and a job need not: masters, and whole items that its state does not name.

    Other libraries save more than a job asks for, and the job had no say in it.
    """

    def __init__(self, opened: Opened, arrays: Sequence[ArrayId], places: Iterable[str]) -> None:
        self._converted = is_converted(opened)
        self._items = {identity.item for identity in arrays} | {_item_of(place) for place in places}
        self._ids = {str(identity): identity for identity in opened.records} if self._converted else {}
        optimizers = {table.item for table in opened.tables}
        self._optimizes = bool(optimizers & self._items) or not optimizers

    def has(self, mismatch: Mismatch) -> bool:
        if not self._converted:
            return False
        identity = self._ids.get(mismatch.name)
        if identity is None:
            return _item_of(mismatch.name) not in self._items
        if identity.state not in ("", "value") and not self._optimizes:
            return True
        return identity.item not in self._items


def _item_of(place: str) -> str:
    return place.split("/")[1].replace("~1", "/").replace("~0", "~") if place.startswith("/") else place


def _ranks_text(some: Sequence[int], every: Sequence[int]) -> str:
    if len(some) == len(every):
        return "every rank" if len(every) > 1 else "this process"
    shown = ", ".join(str(rank) for rank in some[:8])
    return f"rank {shown}" if len(some) == 1 else f"ranks {shown}{', ...' if len(some) > 8 else ''}"


def mismatch_message(path: str, refused: Sequence[tuple[str, str]], strict: str) -> str:
    """`refused` are (what, text) of the differences that the mode `strict` does not let pass; says which mode would."""
    texts = [text for _, text in refused]
    shown = "".join(f"\n  {text}" for text in texts[:SHOWN_MISMATCHES])
    more = f"\n  and {len(texts) - SHOWN_MISMATCHES} more" if len(texts) > SHOWN_MISMATCHES else ""
    noun = "difference" if len(texts) == 1 else "differences"
    way_out = _way_out({what for what, _ in refused}, strict)
    return f"{path}: {len(texts)} {noun} between the state and the checkpoint; nothing was changed:{shown}{more}{way_out}"


def _way_out(what: AbstractSet[str], strict: str) -> str:
    if not what <= {"missing", "unexpected"}:
        return f"\n  (strict={strict!r}; shapes, element types and values must fit in every mode)"
    passes = "unexpected" if what == {"missing"} else "missing"
    mode = passes if strict == "all" and len(what) == 1 else "none"
    noun = {"missing": "the state has and the checkpoint lacks", "unexpected": "the checkpoint has beside"}
    said = " and ".join(noun[one] for one in sorted(what))
    return f"\n  (strict={strict!r}; strict={mode!r} lets pass what {said})"


def joint_notes(notes: Sequence[Sequence[str]], ranks: Sequence[int]) -> list[str]:
    """Notes of all ranks, each once, in their order, with the ranks that have it if those are not all."""
    where: dict[str, list[int]] = {}
    for rank, own in zip(ranks, notes, strict=True):
        for note in own:
            where.setdefault(note, []).append(rank)
    return [note if len(on) == len(ranks) else f"{note} (on {_ranks_text(on, ranks)})" for note, on in where.items()]


def differing_ties(
    opened: Opened, ties: Sequence[tuple[HeldArray, ArrayId]], hosts: Sequence[AnyArray], *, verify: Verify
) -> Iterator[str]:
    """What differs, in words, of this rank's box of each pair. Blocking: reads both; `hosts[i]` has the words of a target."""
    for (held, other), host in zip(ties, hosts, strict=True):
        read = held.spec.id
        records = [opened.records[read], opened.records[other]]
        if (records[0].spec.shape, records[0].spec.dtype) == (records[1].spec.shape, records[1].spec.dtype):
            boxes = [np.empty(host.shape, dtype=host.dtype) for _ in records]
            plan = plan_fetch(opened, [Wanted(record, held.box, box) for record, box in zip(records, boxes, strict=True)])
            require_files(opened, plan)
            carry_out(opened, plan, verify=verify)
            if boxes[0].tobytes() == boxes[1].tobytes():
                continue
        yield (
            f"{other}: value: expected the contents of {read}, as the two are one tensor in this process, "
            f"found others (in the checkpoint)"
        )
