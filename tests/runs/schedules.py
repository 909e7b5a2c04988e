"""Every schedule of several actors over one store, each store operation a point where any other may go first.

An actor is a generator over a store that does at most one operation between two pauses. A node is what stands in the store,
and where each actor is: its stack of generators with their local values. Two schedules that end in one node have one future.
(What a `for` walks is on no list of local values; the steps walk only what follows from those.) An actor is brought to a node
by running it anew on what it saw. An actor that stops for good is one that is not scheduled again, so every crash is covered
by looking at every node.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from run_actors import Notes, tree

from elastickpt.errors import CheckpointError
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import Capabilities, Store
from elastickpt.testing.faults import RecordingStore

Tree = frozenset[tuple[str, bytes | None]]
Actor = Callable[[Store, Notes], Generator[float, None, None]]


class Seen(NamedTuple):
    """One operation of an actor and what it got: a value, or an error."""

    operation: str
    path: str
    value: object
    error: CheckpointError | None


class Place(NamedTuple):
    """Where an actor is, and how it came there; two with one `key` go on in the same way."""

    seen: tuple[Seen, ...]
    notes: Notes
    key: int
    finished: bool


Step = tuple[Tree, Place, list[str]]


class Node(NamedTuple):
    tree: Tree
    places: tuple[Place, ...]

    @property
    def key(self) -> int:
        return hash((self.tree, tuple(place.key for place in self.places)))


@dataclass
class Explored:
    nodes: int
    transitions: int


class _Replaying(RecordingStore):
    """What an actor saw, again; then the store itself."""

    running: _Replaying

    def __init__(self, inner: Store, seen: tuple[Seen, ...], capabilities: Capabilities, *, number: int) -> None:
        super().__init__(inner)
        _Replaying.running = self
        self.number = number
        self.seen = list(seen)
        self.done = 0
        self._able = capabilities

    @property
    def capabilities(self) -> Capabilities:
        return self._able

    def _do(self, act, whole):  # type: ignore[no-untyped-def]
        self.done += 1
        if self.done > len(self.seen):
            try:
                lacks = act.name == "sync_directory"  # memory refuses it, as nothing there is durable
                self.seen.append(Seen(act.name, act.path, None if lacks else whole(), None))
            except CheckpointError as error:
                self.seen.append(Seen(act.name, act.path, None, error))
        found = self.seen[self.done - 1]
        assert (found.operation, found.path) == (act.name, act.path), "an actor is not deterministic"
        if found.error is not None:
            raise found.error
        return found.value


def temporary_name(name: str) -> str:
    """The same for an actor that is run anew, another for every other one."""
    running = _Replaying.running
    return f".{name}.{running.number:08x}{running.done:08x}.tmp"


def is_local(seen: Seen) -> bool:
    """Whether no other actor can tell when it was done: what it reads never changes, what it writes is nobody else's."""
    name = seen.path.rpartition("/")[2]
    if seen.operation == "read":
        return name.startswith("epoch-") and seen.error is None
    if seen.operation in ("sync_directory", "make_directories"):
        return seen.path in ("", "commits")
    return name.endswith(".tmp") and seen.operation in ("create", "sync_file")


def is_local_if_nothing_goes(seen: Seen) -> bool:
    """The same where no actor removes anything, or makes folders."""
    return is_local(seen) or (seen.operation == "read" and seen.error is None) or not seen.path.startswith("commits")


def key_of(actor: Generator[float, None, None], notes: Notes) -> int:
    """Where a paused actor is; 0 with its notes when it ended."""
    stack: list[object] = [notes.key]
    inner: Any = actor
    while inner is not None and inner.gi_frame is not None:
        frame = inner.gi_frame
        held = frame.f_locals
        stack.append((inner.gi_code, frame.f_lasti, tuple((name, _value_key(held[name])) for name in sorted(held))))
        inner = inner.gi_yieldfrom
    return hash(tuple(stack))


def _value_key(value: object) -> object:
    if isinstance(value, RecordingStore | Notes):
        return None
    if isinstance(value, BaseException):
        return (type(value), str(value))
    try:
        return hash(value)
    except TypeError:
        return repr(value)


class Explorer:
    """Walks all nodes, depth first, and shows each one to `check(tree, notes)`, whose error names the schedule."""

    def __init__(
        self,
        store: MemoryStore,
        actors: Mapping[str, Actor],
        check: Callable[[Mapping[str, bytes | None], tuple[Notes, ...]], None],
        *,
        local: Callable[[Seen], bool] = is_local,
        capabilities: Capabilities | None = None,
    ) -> None:
        self.store, self.names, self.actors = store, tuple(actors), tuple(actors.values())
        self.check, self.local = check, local
        self.able = capabilities or store.capabilities
        self.now: dict[str, bytes | None] = dict(tree(store))
        self.steps: dict[
            tuple[int, int, int], Step
        ] = {}  # what an actor does next follows from where it is and what stands there

    def explore(self) -> Explored:
        first = Place((), Notes(), 0, False)
        root = Node(frozenset(self.now.items()), (first,) * len(self.actors))
        known = {root.key}
        pending: list[tuple[Node, tuple[str, ...]]] = [(root, ())]
        transitions = 0
        while pending:
            node, path = pending.pop()
            self._restore(node.tree)
            try:
                self.check(dict(node.tree), tuple(place.notes for place in node.places))
            except AssertionError as error:
                raise _after(path, error) from error
            for number in range(len(self.actors)):
                if node.places[number].finished:
                    continue
                try:
                    after, did = self._step(node, number)
                except CheckpointError as error:
                    raise _after((*path, f"{self.names[number]} fails"), error) from error
                transitions += 1
                if after.key not in known:
                    known.add(after.key)
                    pending.append((after, path + tuple(f"{self.names[number]}: {one}" for one in did)))
        return Explored(len(known), transitions)

    def _step(self, node: Node, number: int) -> tuple[Node, list[str]]:
        """The node after the actor's next operation that others can tell, or its end."""
        place = node.places[number]
        around = (hash(node.tree), number, place.key)
        if around not in self.steps:
            self.steps[around] = self._act(node, number, place)
        standing, after, did = self.steps[around]
        return Node(standing, (*node.places[:number], after, *node.places[number + 1 :])), did

    def _act(self, node: Node, number: int, place: Place) -> Step:
        self._restore(node.tree)
        before = len(place.seen)
        store = _Replaying(self.store, place.seen, self.able, number=number)
        notes = Notes()
        actor = self.actors[number](store, notes)
        finished = False
        while not finished and (store.done <= before or self.local(store.seen[-1])):
            at = store.done
            finished = next(actor, None) is None
            assert store.done - at <= 1, "an actor did two operations between two pauses"
        new = store.seen[before:]
        if any(one.operation not in ("read", "entries", "exists", "sync_directory") for one in new):
            self.now = dict(tree(self.store))
            assert all(self.now.get(path, data) == data for path, data in node.tree), "an object was changed"
        after = Place(tuple(store.seen), notes, key_of(actor, notes), finished)
        did = [f"{one.operation} {one.path}" + (f" -> {one.error}" if one.error else "") for one in new]
        return frozenset(self.now.items()), after, did

    def _restore(self, wanted: Tree) -> None:
        target = dict(wanted)
        other = {path for path in self.now.keys() & target.keys() if self.now[path] != target[path]}
        for path in sorted((self.now.keys() - target.keys()) | other, reverse=True):
            if self.now[path] is None:
                self.store.remove_tree(path)
            else:
                self.store.remove(path)
        for path in sorted((target.keys() - self.now.keys()) | other):
            data = target[path]
            if data is None:
                self.store.make_directories(path)
            else:
                self.store.create(path, data)
        self.now = target


def _after(path: tuple[str, ...], error: Exception) -> AssertionError:
    return AssertionError(f"{type(error).__name__}: {error}\n  after: " + "\n         ".join(path))
