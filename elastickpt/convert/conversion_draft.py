"""Where a conversion is made: a draft beside OUT, begun anew, or taken up where an interrupted one left it. [CLI-67..69]

What a conversion is stands in its draft: the source's files with their sizes and times, programs, options, release. A command
that is the same in all of it takes the draft up once nobody can write it any more, and does what the journal lacks.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from elastickpt.commit.draft import (
    CONVERSION,
    LEFTOVERS,
    Draft,
    DraftFound,
    abort,
    begin,
    drafts_of,
    ended,
    new_draft,
    remove_draft,
    require_free,
    sweep,
    take_up,
)
from elastickpt.convert.journal import Journal
from elastickpt.errors import CheckpointError, MissingFile, NotDurable, Refused, WriterLost
from elastickpt.format.canonical_json import dump, parse
from elastickpt.format.version import MAX_MANIFEST_NBYTES
from elastickpt.storage.opening import locate_for_saving

_FORMAT, _VERSION = "elastickpt-conversion", 1


class ConversionDraft:
    """As a context: on an error the draft is removed; it stays after an interrupt or the loss of a worker, to be taken up.

    `sizes` are those of the journal. `done` is what each task left that an interrupted conversion had done; `said` what a user
    is told of drafts that were found.
    """

    def __init__(self, path: str, description: Mapping[str, str], sizes: Sequence[int]) -> None:
        self.store, self.name = locate_for_saving(path)
        require_free(self.store, self.name)
        self.done: Mapping[int, bytes] = {}
        self.said: list[str] = []
        self._path, self._description, self._sizes = path, dict(description), tuple(sizes)
        self._open = new_draft(self.name, pid=os.getpid())
        self._committed = False

    @classmethod
    def joined(cls, path: str, draft: Draft, sizes: Sequence[int]) -> Self:
        """Another worker at a draft that worker 0 has begun or taken up, and commits."""
        found = cls(path, {}, sizes)
        found._open = draft
        found._journal = Journal(found.store, draft, sizes)
        found._journal.open()
        return found

    @property
    def draft(self) -> Draft:
        return self._open

    def note(self, task: int, left: bytes) -> None:
        """A task is done, and need not be done again."""
        self._journal.note(task, left)

    def __enter__(self) -> Self:
        try:
            found = self._found()
            sweep(self.store, self.name)
            if found is not None:
                self._take_up(found)
            else:
                self._begin()
        except BaseException:
            ended(self.draft)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.close()
        if self._committed:
            return
        if error is None or (isinstance(error, Exception) and not isinstance(error, WriterLost)):
            abort(self.store, self.draft)
        else:
            ended(self.draft)

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """OUT gets its name here, after which nothing is undone: an interrupt waits, and is none if all is good."""
        with _uninterrupted():
            try:
                yield
            except NotDurable:
                self._end()  # and whole
                raise
            self._end()

    def confirm(self) -> None:
        """The name of OUT is durable. Raises NotDurable."""
        if not self.store.capabilities.directory_sync:
            return
        try:
            self.store.sync_directory("")
        except CheckpointError as error:
            raise NotDurable(f"{self._path} is whole, but its name may not survive a power cut: {error}") from error

    def _end(self) -> None:
        self._committed = True
        ended(self.draft)

    def seal(self) -> None:
        """The draft holds what OUT will hold, and nothing else; it can be taken up no more. Its name is next."""
        self._journal.close()
        for beside in LEFTOVERS:
            self.store.remove(self.draft.path(beside))
        if self.store.capabilities.directory_sync:
            self.store.sync_directory(self.draft.folder)

    # -- what stands there

    def _begin(self) -> None:
        begin(self.store, self.draft)
        self._journal = Journal(self.store, self.draft, self._sizes)
        try:
            self._journal.open()
            self.store.create(self.draft.path(CONVERSION), self._record())
        except CheckpointError:
            self._journal.close()
            abort(self.store, self.draft)
            raise

    def _take_up(self, found: DraftFound) -> None:
        try:
            self._open = take_up(self.store, found, self.name, pid=os.getpid())
        except MissingFile:
            raise Refused(f"{self._path}: another process has taken up the draft {found.folder} just now") from None
        self._journal = Journal(self.store, self.draft, self._sizes)
        self.done = self._journal.done()
        self._journal.open()
        self.store.remove_tree(self.draft.path("fragments"))  # workers may be others now
        self.store.make_directories(self.draft.path("fragments"))
        self.said.append(f"an interrupted conversion goes on: {len(self.done)} of {len(self._sizes)} arrays are there")

    def _found(self) -> DraftFound | None:
        """The draft to take up. Those of other conversions into OUT that nobody writes are removed. Raises Refused."""
        found = drafts_of(self.store, self.name)
        for one in found:
            if one.lives:
                raise Refused(f"{self._path}: it is being written: {one.why} (draft {one.folder}); wait for its end, or end it")
        taken: DraftFound | None = None
        for one in found:
            if not one.resumable:
                continue
            if one.why is not None:
                self.said.append(f"draft {one.folder} of an interrupted conversion is left alone: {one.why}")
                continue
            differs = self._difference(one) if taken is None else "there is another one like it"
            if differs is None:
                taken = one
                continue
            remove_draft(self.store, one.folder)
            self.said.append(f"an interrupted conversion is not taken up, this one begins anew: {differs}")
        return taken

    # -- what a conversion is

    def _record(self) -> bytes:
        return dump({"format": _FORMAT, "version": _VERSION, "conversion": self._description}).encode()

    def _difference(self, found: DraftFound) -> str | None:
        """How the conversion of a draft differs from this one, in words."""
        path = f"{found.folder}/{CONVERSION}"
        try:
            record = parse(self.store.read(path, MAX_MANIFEST_NBYTES), where=path)
        except CheckpointError as error:
            return f"what it was cannot be read: {error.message}"
        then = record.get("conversion") if isinstance(record, dict) else None
        if not isinstance(record, dict) or not isinstance(then, dict) or record.get("version") != _VERSION:
            return "another release began it"
        now = self._description
        name = next((one for one in (*then, *now) if then.get(one) != now.get(one)), None)
        return None if name is None else f"{name}: {then.get(name, 'none')} then, {now.get(name, 'none')} now"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """An interrupt is raised at the end, in place of an error, and never if there was none."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield
    except CheckpointError:
        if interrupts:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)
