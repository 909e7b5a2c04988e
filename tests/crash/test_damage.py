"""Every region of a small checkpoint of two writers flipped, cut, grown, deleted, replaced and swapped: found, or harmless.

`verify` reports each one. A load delivers exactly what was saved, or raises an error of ours with the state unchanged or said
to be undefined; so does every read through `ek.open`. [SAVE-6]
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from fingerprint import fingerprint
from simulated import Files, Outcome, State, files, load_from, opened, save_on

import elastickpt as ek
from elastickpt.errors import CheckpointError
from elastickpt.layout import grid, packs, placement
from elastickpt.loading.read_runs import RunReader
from elastickpt.saving.request import PlacementChoice
from elastickpt.saving.save import CheckpointInfo
from elastickpt.storage.memory import MemoryStore
from elastickpt.writer import plans

BLOCK = 64 << 10  # the smallest that the format allows, so that small pieces have several
Sort = Literal["manifest", "index", "fragment map", "document", "references", "chunk"]
How = Literal["flipped", "truncated", "grown", "deleted", "replaced", "swapped", "of another checkpoint"]
HOWS: tuple[How, ...] = ("flipped", "truncated", "grown", "deleted", "replaced", "swapped", "of another checkpoint")
SORTS: Mapping[PlacementChoice, tuple[Sort, ...]] = {
    "plain": ("manifest", "index", "fragment map", "document", "chunk"),
    "packed": ("manifest", "index", "fragment map", "references", "chunk"),
}
DERIVED: frozenset[Sort] = frozenset(("document", "references"))  # which a load does not read


@dataclass(frozen=True, slots=True)
class Damage:
    """What stands at some paths instead of what was saved; None: nothing. `path` is the file that it is about."""

    how: How
    path: str
    detail: str
    changes: Mapping[str, bytes | None]


def sort_of(path: str) -> Sort:
    if path.endswith("checkpoint.json"):
        return "manifest"
    if path.endswith("index.msgpack"):
        return "index"
    if "/fragments/" in path:
        return "fragment map"
    if path.endswith("references.json"):
        return "references"
    return "document" if path.endswith("zarr.json") else "chunk"


def job(seed: int) -> State:
    """A module, an optimizer with state, tensors beside them, plain values and random streams: every sort of file."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01 * seed)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    extra = {"large": torch.randn(300, 150), "small": torch.arange(7) + seed}  # two chunks of several blocks, and a pad
    return {"model": model, "optimizer": optimizer, "extra": extra, "note": f"seed {seed}", "rng": ek.RNG()}


class Saved:
    """A checkpoint in memory, and what it gives undamaged."""

    def __init__(self, store: MemoryStore, placement: PlacementChoice) -> None:
        self.store, self.placement = store, placement
        state = job(1)
        self.content = fingerprint(state)
        own = self._save("c", state)
        self.files = files(store, "c")
        self.facts = self.read("c")
        self.held = self._held()
        other = self._save("other", job(2))
        self.others_facts = self.read("other")
        named = {path.replace(other, own): data for path, data in files(store, "other").items()}
        self.others = {"c" + path.removeprefix("other"): data for path, data in named.items()}

    def _save(self, name: str, state: State) -> str:
        """The attempt, which names packs."""
        (attempt, _) = (self._attempt(one) for one in save_on([self.store] * 2, name, [state] * 2, placement=self.placement))
        return attempt

    def _attempt(self, outcome: Outcome) -> str:
        assert isinstance(outcome, CheckpointInfo), outcome
        return outcome.attempt

    def _held(self) -> Mapping[str, bytearray]:
        """Of each file with pieces, which of its bytes are in one."""
        found: dict[str, bytearray] = {}
        for columns in opened(self.store, "c").fragments():
            for piece in columns.pieces.objects():
                path = f"c/{columns.files[piece.file].path}"
                mask = found.setdefault(path, bytearray(len(self.files[path])))
                mask[piece.offset : piece.offset + piece.nbytes] = b"\1" * piece.nbytes
        return found

    def read(self, name: str) -> Mapping[str, Hashable]:
        """What `ek.open` gives, by what was asked for; an error's class where it raised one of ours."""
        found: dict[str, Hashable] = {}

        def ask(what: str, read: Callable[[], Hashable]) -> None:
            try:
                found[what] = read()
            except CheckpointError as error:
                found[what] = type(error)

        try:
            checkpoint = opened(self.store, name)
        except CheckpointError:
            return {}
        ask("values", lambda: repr(checkpoint.values))
        ask("tables", lambda: repr(checkpoint.tables))
        for writer in range(2):
            ask(f"values of {writer}", lambda writer=writer: repr(checkpoint.per_rank(writer)))  # type: ignore[misc]
        ask("records", lambda: repr(checkpoint.records))
        if isinstance(found["records"], str):
            for identity in checkpoint.records:
                ask(str(identity), lambda identity=identity: checkpoint.read(identity).tobytes())  # type: ignore[misc]
        return found

    def put(self, changes: Mapping[str, bytes | None]) -> None:
        for path, data in changes.items():
            self.store.remove(path)
            if data is not None:
                self.store.create(path, data)


@pytest.fixture(scope="module", params=["plain", "packed"])
def saved(request: pytest.FixtureRequest) -> Iterator[Saved]:
    name = f"damage-{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "MIN_SPLIT_NBYTES", 8)
        patch.setattr(packs, "WHOLE_NBYTES", 8)
        patch.setattr(grid, "CHUNK_NBYTES", 160_000)
        patch.setattr(packs, "CHUNK_NBYTES", 160_000)
        patch.setattr(plans, "BLOCK_NBYTES", BLOCK)
        yield Saved(MemoryStore(name), request.param)
    MemoryStore("").remove_tree(name)


# -- every damage --------------------------------------------------------------------------------------------------------


def places(saved: Saved, path: str) -> list[int]:
    """Bytes that are flipped: of records and documents every 16th; of a chunk file the ends and middle of every block and of
    every pad. The first and last byte of all."""
    nbytes = len(saved.files[path])
    found = {0, nbytes - 1}
    if sort_of(path) != "chunk":
        return sorted({*found, *range(0, nbytes, 16)})
    used = set()
    for columns in opened(saved.store, "c").fragments():
        for number in range(len(columns.pieces)):
            piece = columns.pieces.piece(number)
            if f"c/{columns.files[piece.file].path}" == path:
                assert piece.row_nbytes == piece.nbytes, "one range of the file"
                used |= {piece.offset, piece.offset + piece.nbytes}
                for start in range(0, piece.nbytes, BLOCK):
                    stop = min(start + BLOCK, piece.nbytes)
                    found |= {piece.offset + at for at in (start, (start + stop) // 2, stop - 1)}
    return sorted({*found, *(at for at in used if at < nbytes), *([(max(used) + nbytes) // 2] if max(used) < nbytes else [])})


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]


def damages(saved: Saved) -> Iterator[Damage]:
    """All of them; one that leaves every byte as it was is none."""
    whole = saved.files
    for path, data in whole.items():
        for at in places(saved, path):
            yield Damage("flipped", path, f"byte {at}", {path: flipped(data, at)})
        for nbytes in {0, len(data) // 2, len(data) - 1}:
            yield Damage("truncated", path, f"to {nbytes}", {path: data[:nbytes]})
        yield Damage("grown", path, "by a byte", {path: data + b"\0"})
        if sort_of(path) != "references":  # it is derived: its absence is no damage [UCF-6]
            yield Damage("deleted", path, "", {path: None})
        if saved.others[path] != data:
            yield Damage("of another checkpoint", path, "", {path: saved.others[path]})
        for other in replacements(whole, path):
            yield Damage("replaced", path, f"by {other}", {path: whole[other]})
    for one, other in itertools.combinations(whole, 2):
        if whole[one] != whole[other]:
            yield Damage("swapped", one, f"with {other}", {one: whole[other], other: whole[one]})


def replacements(whole: Files, path: str) -> list[str]:
    """Every other file of the same length, and one of another length."""
    others = [other for other in whole if whole[other] != whole[path]]
    same = [other for other in others if len(whole[other]) == len(whole[path])]
    return [*same, next(other for other in others if other not in same)]


def judge(saved: Saved, damage: Damage) -> str:
    """How a load of it ended: "harmless" or an error's kind. Leaves all files as they were."""
    saved.put(damage.changes)
    try:
        assert not sound(saved), "verify does not report it"
        known = saved.others_facts if is_manifest_of_another(damage) else saved.facts
        for what, fact in saved.read("c").items():
            assert isinstance(fact, type) or fact == known[what], f"something else was read of {what}"
        return load(saved)
    except BaseException as error:
        error.add_note(f"{damage.path} {damage.how} {damage.detail}")
        raise
    finally:
        saved.put({path: saved.files[path] for path in damage.changes})


def is_manifest_of_another(damage: Damage) -> bool:
    """Nothing outside of a manifest says that it is the right one, but for a run's register: it speaks for itself."""
    return damage.how == "of another checkpoint" and sort_of(damage.path) == "manifest"


def sound(saved: Saved) -> bool:
    try:
        return opened(saved.store, "c").verify().sound
    except CheckpointError:
        return False


def load(saved: Saved) -> str:
    into = job(3)
    untouched = fingerprint(into)
    try:
        load_from(saved.store, "c", into)
    except CheckpointError as error:
        if "content of `state` is now undefined" not in error.message:
            assert fingerprint(into) == untouched, "a state that was not said to be undefined has changed"
        return error.kind
    assert fingerprint(into) == saved.content, "something else than what was saved was loaded"
    return "harmless"


def judge_all(saved: Saved, every: Sequence[Damage]) -> None:
    for damage in every:
        ended = judge(saved, damage)
        sorts = {sort_of(path) for path in damage.changes}
        if ended == "harmless":
            assert sorts <= DERIVED or in_a_pad(saved, damage), damage
        else:
            assert not sorts <= DERIVED, "a load reads no documents and no references"
    assert sound(saved)
    assert load(saved) == "harmless"


def in_a_pad(saved: Saved, damage: Damage) -> bool:
    """Whether what is flipped belongs to no piece."""
    data, held = saved.files[damage.path], saved.held.get(damage.path)
    if damage.how != "flipped" or held is None:
        return False
    changed = damage.changes[damage.path] or b""
    return all(not used for used, one, other in zip(held, data, changed, strict=True) if one != other)


def some(saved: Saved, count: int) -> list[Damage]:
    """Of every sort of file and every kind of damage so many, spread over all of that kind."""
    of: dict[tuple[Sort, How], list[Damage]] = {}
    for damage in damages(saved):
        of.setdefault((sort_of(damage.path), damage.how), []).append(damage)
    return [group[k * (len(group) - 1) // max(count - 1, 1)] for group in of.values() for k in range(min(count, len(group)))]


def test_the_checkpoint_has_every_sort_of_file_and_every_kind_of_damage(saved: Saved) -> None:
    every = list(damages(saved))
    sorts = SORTS[saved.placement]
    assert {sort_of(path) for path in saved.files} == set(sorts)
    assert {(sort_of(damage.path), damage.how) for damage in every} >= {
        (sort, how) for sort in sorts for how in HOWS if (sort, how) not in NEVER
    }
    assert all(dict(saved.files) != {**saved.files, **damage.changes} for damage in every)
    assert any(in_a_pad(saved, damage) for damage in every)
    assert not any(isinstance(fact, type) for fact in saved.facts.values())


NEVER = {
    ("document", "of another checkpoint"),  # says the same in every checkpoint of this structure
    ("references", "deleted"),
    ("references", "swapped"),  # counted with the file that it is swapped with
}


def test_damage_of_every_kind_in_every_sort_of_file_is_found_or_harmless(saved: Saved) -> None:
    judge_all(saved, some(saved, 6))


def test_a_load_that_verifies_no_block_is_seen(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunReader, "_require", lambda *args: None)
    damage = next(damage for damage in damages(saved) if (damage.how, sort_of(damage.path)) == ("flipped", "chunk"))
    with pytest.raises(AssertionError, match="something else was read"):
        judge(saved, damage)
    saved.put({damage.path: flipped(saved.files[damage.path], 0)})
    with pytest.raises(AssertionError, match="something else than what was saved"):
        load(saved)
    saved.put({damage.path: saved.files[damage.path]})


@pytest.mark.long
def test_every_damage_is_found_or_harmless(saved: Saved) -> None:
    every = list(damages(saved))
    assert len(every) > 1000
    judge_all(saved, every)
