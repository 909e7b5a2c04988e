"""Saves and loads by members that are threads of this process, each through a store of its own; and what must hold after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from fingerprint import fingerprint

from elastickpt.commit import attempt
from elastickpt.errors import DeadlineExceeded
from elastickpt.format.arrays import Mesh
from elastickpt.loading import opened as opening
from elastickpt.loading import session as loading
from elastickpt.loading.checkpoint import Checkpoint
from elastickpt.loading.session import LoadReport, _Load
from elastickpt.ranks.hub import Hub
from elastickpt.ranks.processes import Acquaintances
from elastickpt.ranks.spoke import Spoke
from elastickpt.ranks.star import Star
from elastickpt.ranks.team import Alone, Call, Team
from elastickpt.saving import structures as proposing
from elastickpt.saving.request import PlacementChoice, Request
from elastickpt.saving.save import CheckpointInfo, save_with
from elastickpt.storage.store import Durability, Store

State = dict[str, object]
Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Member:
    """What `save` and `load` ask of a process group, without one."""

    rank: int
    ranks: tuple[int, ...]
    handle: None = None

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def member(self) -> int:
        return self.rank


class Words:
    """A job's key-value store within one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str, *, timeout_s: float) -> bytes:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_s):
                raise DeadlineExceeded(f"no key {key!r} after {timeout_s:g} s")
            return self._values[key]

    def has(self, key: str) -> bool:
        with self._changed:
            return key in self._values


def stars(count: int, *, silence_s: float = 20.0) -> list[Star]:
    """The members of one team, by member, which have met, and are in a call; each with a knowledge of its own."""
    words, ranks = Words(), tuple(range(count))

    def met(member: int) -> Star:
        star = (Spoke if member else Hub)(lambda: words, member, ranks, Acquaintances(), silence_s=silence_s)
        star.enter(Call("meeting", 60.0))
        star.round("meet", lambda: b"", lambda payloads: [b""] * count)
        return star

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(met, ranks))


def teams(count: int, *, silence_s: float = 20.0) -> list[Team]:
    """The members of one team, by member."""
    if count == 1:
        return [Alone(0, "host")]
    return list(stars(count, silence_s=silence_s))


def state(seed: int) -> State:
    """A model with momentum and a plain value: two arrays. Equal seeds give equal states."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "note": f"seed {seed}"}


def mesh(world: int) -> Mesh | None:
    """Declares every tensor a replica on all members, which then share the writing of each."""
    return Mesh("all", ("replica",), (world,), tuple(range(world))) if world > 1 else None


Outcome = CheckpointInfo | BaseException


def save_on(
    stores: Sequence[Store],
    name: str,
    states: Sequence[State],
    *,
    durability: Durability = "power",
    placement: PlacementChoice = "plain",
) -> list[Outcome]:
    """How `save` ended on each member, one a store; all members' threads have ended."""
    found: list[Outcome] = []
    joined = teams(len(stores))
    ranks = tuple(range(len(stores)))

    def one(member: int) -> Outcome:
        request = Request(f"{member}/{name}", 7, placement, durability)
        try:
            return save_with(joined[member], Member(member, ranks), request, states[member], mesh(len(stores)))  # type: ignore[arg-type]
        except BaseException as error:
            return error

    def located(path: str) -> tuple[Store, str]:
        member, _, last = path.partition("/")
        return stores[int(member)], last

    try:
        with replaced(attempt, "locate_for_saving", located), replaced(proposing, "mesh_of", lambda mesh, world_size: mesh):
            found.extend(everywhere(len(stores), one))  # type: ignore[arg-type]
    finally:
        for team in joined:
            team.end("the test is over")
    return found


def load_from(store: Store, name: str, into: State) -> LoadReport:
    """`load` by one process, from a store object."""
    with replaced(opening, "locate", lambda path: (store, name)):
        return _Load(Member(0, (0,)), Alone(0, "host"), name, "all", "on").run(into, None)  # type: ignore[arg-type]


def load_on(stores: Sequence[Store], name: str, states: Sequence[State]) -> list[LoadReport | BaseException]:
    """How `load` ended on each member, one a store."""
    joined, ranks = teams(len(stores)), tuple(range(len(stores)))

    def located(path: str) -> tuple[Store, str]:
        member, _, last = path.partition("/")
        return stores[int(member)], last

    def one(member: int) -> object:
        load = _Load(Member(member, ranks), joined[member], f"{member}/{name}", "all", "on")  # type: ignore[arg-type]
        return load.run(states[member], mesh(len(stores)))  # type: ignore[arg-type]

    try:
        with replaced(opening, "locate", located), replaced(loading, "mesh_of", lambda mesh, world_size: mesh):
            return everywhere(len(stores), one)  # type: ignore[return-value]
    finally:
        for team in joined:
            team.end("the test is over")


def opened(store: Store, name: str) -> Checkpoint:
    """`ek.open`, from a store object."""
    return Checkpoint(opening.open_in(store, name))


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """A name of a module means something else for a while: stores come as objects here, not as paths."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def files(store: Store, folder: str) -> Files:
    """Every file below a folder: path → content."""
    found: dict[str, bytes] = {}
    for entry in store.entries(folder):
        path = f"{folder}/{entry.name}"
        if entry.kind == "directory":
            found.update(files(store, path))
        else:
            found[path] = store.read(path, 1 << 30)
    return found


def require_whole(store: Store, name: str, expected: State) -> None:
    """The checkpoint verifies, and loads bit by bit what was saved."""
    report = opened(store, name).verify()
    assert report.problems == ()
    fresh = state(12345)
    load_from(store, name, fresh)
    assert fingerprint(fresh) == fingerprint(expected)


def drafts(store: Store) -> list[str]:
    return [entry.name for entry in store.entries("") if ".draft-" in entry.name]


def require_absent_or_whole(store: Store, name: str, expected: State) -> bool:
    """Whether it is there; then it is whole."""
    if not store.exists(name):
        return False
    require_whole(store, name, expected)
    return True


def everywhere(count: int, work: Callable[[int], object]) -> list[object]:
    """`work` of each member at once; an error is returned instead of raised."""

    def one(member: int) -> object:
        try:
            return work(member)
        except BaseException as error:
            return error

    if count == 1:
        return [one(0)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
