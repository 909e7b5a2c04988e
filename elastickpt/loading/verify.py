"""`verify`: every byte of a checkpoint against its records, and nothing besides. Needs no torch.

[UCF-2, UCF-10..17, UCF-161..164]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from elastickpt.commit.prove import prove
from elastickpt.errors import CheckpointError, DocumentMismatch, MissingFile, StorageFailed, StrayFile
from elastickpt.format.agreement import check_keys, check_writers
from elastickpt.format.documents import documents
from elastickpt.format.keys import MANIFEST, REFERENCES, ROOT_DOCUMENT
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.version import MAX_FRAGMENTS_NBYTES, MAX_MANIFEST_NBYTES, PACKS
from elastickpt.layout.references import check_references, references_of
from elastickpt.loading.opened import Opened
from elastickpt.loading.verify_files import file_tasks, verify_files
from elastickpt.storage.opening import path_in

_HOLD_PIECES = ("params", "extra", "packs")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it was written: an error kind, what and where."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` looked at, and what it found; `problems` is empty for a sound checkpoint."""

    path: str
    arrays: int
    files: int
    nbytes: int
    problems: tuple[Problem, ...]

    @property
    def sound(self) -> bool:
        return not self.problems


def verify(opened: Opened, *, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
    """Looks at everything: records, names, coverage, documents, every block, pads, stray files. Blocking.

    Damage does not raise: it is in the report. `progress(done, total)` counts bytes, rising. Raises StorageFailed kinds
    where the store cannot be read.
    """
    return _Verification(opened).run(progress)


class _Verification:
    """One call of `verify` under way; what is wrong is collected, so that one problem does not hide another."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._problems: list[Problem] = []

    def run(self, progress: Callable[[int, int], None]) -> VerifyReport:
        opened = self._opened
        indexed = self._holds(lambda: opened.records)
        maps = self._maps() if indexed else self._only_digests()
        mapped = indexed and len(maps) == len(opened.manifest.fragments)
        covered = mapped and self._proof(maps)
        named = indexed and self._holds(lambda: check_keys(opened.records.values()))
        if covered and named and PACKS in opened.manifest.requires:
            self._references(maps)
        tasks = file_tasks(maps)
        expected = {task.file.path for task in tasks if task.file.base == 0}
        if opened.manifest.placement == "plain":
            expected |= self._documents() if named else {ROOT_DOCUMENT}
        expected |= {MANIFEST, *(e.file.path for e in opened.manifest.index), *(f.path for f in opened.manifest.fragments)}
        self._strays(expected, within=() if mapped and named else _HOLD_PIECES)
        for error in verify_files(opened, tasks, pads="zero" if covered else "unknown", progress=progress):
            self._note(error)
        nbytes = sum(task.nbytes for task in tasks)
        arrays = len(opened.records) if indexed else 0
        return VerifyReport(path_in(opened.store, opened.name), arrays, len(expected), nbytes, tuple(self._problems))

    def _note(self, error: CheckpointError) -> None:
        self._problems.append(Problem(error.kind, error.message))

    def _holds(self, check: Callable[[], object]) -> bool:
        """Whether a check passes; what it raises about the checkpoint is noted, what the store cannot do is raised."""
        try:
            check()
        except StorageFailed:
            raise
        except CheckpointError as error:
            self._note(error)
            return False
        return True

    # -- records -------------------------------------------------------------------------------------------------------

    def _maps(self) -> list[FragmentColumns]:
        """All fragment maps that can be read and agree with index and manifest."""
        maps: list[FragmentColumns] = []
        for writer in range(len(self._opened.manifest.fragments)):
            self._holds(lambda writer=writer: maps.append(self._opened.fragments(writer)))  # type: ignore[misc]
        return maps

    def _only_digests(self) -> list[FragmentColumns]:
        """Without an index no map can be held against it: whether each one's bytes are those that were written."""
        for said in self._opened.manifest.fragments:
            self._holds(lambda said=said: self._opened.record(said, MAX_FRAGMENTS_NBYTES))  # type: ignore[misc]
        return []

    def _proof(self, maps: Sequence[FragmentColumns]) -> bool:
        """Whether every element is in one piece, so that all other bytes are pads."""
        records = tuple(self._opened.records.values())
        self._holds(lambda: check_writers(records, [columns.pieces.arrays for columns in maps]))
        return self._holds(lambda: prove(records, maps))

    def _references(self, maps: Sequence[FragmentColumns]) -> None:
        """The derived file says what the records say, where it is there. [UCF-161, UCF-163, UCF-164]"""
        opened = self._opened
        try:
            data = opened.store.read(opened.path(REFERENCES), MAX_FRAGMENTS_NBYTES)
        except MissingFile:
            return
        except StorageFailed:
            raise
        except CheckpointError as error:
            self._note(error)
            return
        for problem in check_references(data, references_of(tuple(opened.records.values()), maps)):
            self._note(problem)

    def _documents(self) -> set[str]:
        """Every zarr document is byte for byte what the index says. [UCF-8, UCF-10]"""
        paths = set()
        for path, expected in documents(self._opened.parts):
            paths.add(path)
            try:
                found = self._opened.store.read(self._opened.path(path), MAX_MANIFEST_NBYTES)
            except CheckpointError as error:
                self._note(error)
                continue
            if found != expected:
                self._note(DocumentMismatch(f"{path}: differs from what the index says it is"))
        return paths

    def _strays(self, expected: Iterable[str], *, within: tuple[str, ...]) -> None:
        """The tree holds nothing that is not named. [UCF-2, UCF-6, UCF-19]

        `within`: folders at the top in which files may stand that a record names which cannot be read.
        """
        files = set(expected)
        if self._opened.manifest.placement == "packed":
            files.add(REFERENCES)  # derived from the records: may be there or not
        folders = {"", *within}
        for path in files:
            while path:
                path = path.rpartition("/")[0]
                folders.add(path)
        for folder in sorted(folders):
            if folder.partition("/")[0] in within:
                continue
            try:
                held = self._opened.store.entries(self._opened.path(folder).rstrip("/"))
            except CheckpointError:
                continue  # the files that should be in it are reported as missing
            for entry in held:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if path not in (folders if entry.kind == "directory" else files):
                    what = "link or special file" if entry.kind == "other" else entry.kind
                    self._note(StrayFile(f"{path}: a {what} that no record names"))
