"""Every state of a save beside training × everything that may happen in it, by real saves: the outcome is what the table says.

[SAVE-94, SAVE-99, SAVE-104]
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import elastickpt as ek
from elastickpt.commit import committer
from elastickpt.errors import CheckpointError, InternalError, NoSpace, RankFailure, Refused, StorageFailed
from elastickpt.ranks.process_group import job_group
from elastickpt.saving import beside, save_states, saver
from elastickpt.saving.async_save import close_all, saver_of
from elastickpt.saving.beside import SavesBeside
from elastickpt.saving.save_states import TABLE, Event, Room, SaveProgress, SaveState, TellOthers, Transition
from elastickpt.saving.saver import Saver
from elastickpt.saving.staging import Stager
from elastickpt.saving.task import SaveTask
from elastickpt.writer.attempt_worker import AttemptWorker
from elastickpt.writer.submissions import Submission
from elastickpt.writer.thread import ThreadWriter

LIMIT_S = 60.0
THREAD = ek.AsyncOptions(executor="thread")
ROUNDS = ek.AsyncOptions(executor="thread", arena_nbytes=(1 << 20) + 4096)
FULL = NoSpace("no space left on device")

Cell = tuple[SaveState, Event]


def state(numbers: int = 5000) -> dict[str, Any]:
    return {"t": torch.full((numbers,), 1.0), "note": "always the same"}


class Scene:
    """One save in which something happens."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.path, self.patch, self.options = folder / "c", patch, THREAD
        self.live = state()
        self.handle: ek.SaveHandle | None = None
        self.seen: list[Cell] = []
        patch.setattr(SaveProgress, "advance", self._advance(SaveProgress.advance))

    def _advance(self, real: Callable[[SaveProgress, Event], Transition]) -> Callable[[SaveProgress, Event], Transition]:
        def advance(progress: SaveProgress, event: Event) -> Transition:
            self.seen.append((progress.state, event))
            return real(progress, event)

        return advance

    def known(self, options: ek.AsyncOptions = THREAD, numbers: int = 5000) -> None:
        """The structure is known, and its arena there."""
        self.options, self.live = options, state(numbers)
        ek.async_save(self.live, self.path.parent / "known", options=options).result(LIMIT_S)
        self.seen.clear()

    def failing(self, owner: Any, name: str, error: BaseException = FULL, *, then: Callable[[], object] | None = None) -> None:
        """From now on this function raises; it first waits for `then`."""

        def fail(*args: Any, **options: Any) -> Any:
            if then is not None:
                then()
            raise error

        self.patch.setattr(owner, name, fail)

    def before(self, owner: Any, name: str, wait: Callable[..., object]) -> None:
        """From now on this function waits first."""
        real = getattr(owner, name)

        def waiting(*args: Any, **options: Any) -> Any:
            wait(*args)
            return real(*args, **options)

        self.patch.setattr(owner, name, waiting)

    def demand(self, cell: Cell) -> None:
        """It was reached, or is in a moment, as some come behind the outcome."""
        until = time.monotonic() + LIMIT_S
        while cell not in self.seen:
            assert time.monotonic() < until, self.seen
            time.sleep(0.005)

    def save(self) -> BaseException | None:
        """How it ended."""
        taken: list[SaveTask] = []
        real = saver.SaveTask

        def made(*args: Any) -> SaveTask:
            taken.append(real(*args))
            return taken[0]

        with self.patch.context() as patch:
            patch.setattr(saver, "SaveTask", made)
            with suppress(KeyboardInterrupt):
                ek.async_save(self.live, self.path, options=self.options)
        self.handle = taken[0].handle
        return self.handle.exception(LIMIT_S)


def goes_well(scene: Scene) -> None:
    scene.known()


def goes_in_rounds(scene: Scene) -> None:
    scene.known(ROUNDS, 1 << 20)


def cannot_be_captured(scene: Scene) -> None:
    scene.live = {**state(), "f": print}


def is_interrupted(scene: Scene) -> None:
    scene.failing(saver, "propose", KeyboardInterrupt())


def is_refused_where_it_goes(scene: Scene) -> None:
    (scene.path).mkdir()
    (scene.path / "x").write_text("x")


def meets_a_fault_in_a_round(scene: Scene) -> None:
    """Which is reported, also by one rank to itself."""
    scene.failing(beside.Pipeline, "_open", RuntimeError("a fault"))


def is_not_staged_before_the_opening(scene: Scene) -> None:
    scene.failing(Stager, "stage")


def does_not_see_the_draft(scene: Scene) -> None:
    scene.known()
    scene.failing(beside, "require_token")


def hears_of_a_failure_after_the_opening(scene: Scene) -> None:
    """As from a rank that does not see the draft, in a round that gathers values."""
    scene.known()
    scene.failing(beside, "require_token", StorageFailed("rank 0: no", report=((RankFailure(0, "storage-failed", "no")),)))


def is_staged_too_late(scene: Scene) -> None:
    """All rounds are staged behind the opening."""
    scene.known(ek.AsyncOptions(executor="thread", arena_nbytes=(1 << 20) + 4096, stall_limit_s=0.5), 1 << 20)
    left = threading.Event()
    real = Saver._of_the_others

    def awaited(self: Saver, future: Any) -> Any:
        try:
            return real(self, future)
        finally:
            if not future.done():
                left.set()

    scene.patch.setattr(Saver, "_of_the_others", awaited)
    scene.before(SavesBeside, "_share", lambda *_: left.wait(LIMIT_S))


def has_a_writer_that_takes_nothing_more(scene: Scene) -> None:
    scene.known()
    scene.failing(ThreadWriter, "submit", Refused("this writer was closed"))


def is_not_staged_while_written(scene: Scene) -> None:
    scene.known(ROUNDS, 1 << 20)
    real, calls = Stager.stage, []

    def second_fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise FULL
        return real(*args)

    scene.patch.setattr(Stager, "stage", second_fails)


def is_not_written(scene: Scene) -> None:
    from elastickpt.writer import write_files

    scene.known()
    scene.failing(write_files, "write_slices")


def is_decided_while_written(scene: Scene) -> None:
    """By another rank's failure, as its vote comes to the committer."""
    from elastickpt.writer import write_files

    scene.known()
    decided = threading.Event()
    scene.before(write_files, "write_slices", lambda *_: (abort(scene), decided.wait(LIMIT_S)))
    scene.patch.setattr(Submission, "decide", _then(Submission.decide, decided.set))


def abort(scene: Scene) -> None:
    (writer,) = saver_of(job_group(None), scene.options)._writers._writers.values()
    assert isinstance(writer, ThreadWriter)
    assert writer._part is not None
    ballot, until = writer._part._ballot, time.monotonic() + LIMIT_S
    while not ballot._open:  # its thread enrols the attempt
        assert time.monotonic() < until
        time.sleep(0.005)
    (key,) = ballot._open
    ballot.say(key, RankFailure(0, "no-space", "no space left on another device"))


def _then(real: Callable[..., Any], call: Callable[[], object]) -> Callable[..., Any]:
    def both(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        call()
        return found

    return both


def is_decided_before_it_is_known_to_be_written(scene: Scene) -> None:
    """It has attested, and the commit fails, a moment before its writer says that it has written."""
    is_not_committed(scene)
    decided = threading.Event()
    scene.patch.setattr(Submission, "decide", _then(Submission.decide, decided.set))
    scene.patch.setattr(AttemptWorker, "carry_out", _then(AttemptWorker.carry_out, lambda: decided.wait(LIMIT_S)))


def is_not_committed(scene: Scene) -> None:
    scene.known()
    scene.failing(committer, "commit")


def is_given_up_behind_its_attestation(scene: Scene) -> None:
    scene.known()
    real = AttemptWorker.carry_out

    def late(*args: Any, **options: Any) -> Any:
        real(*args, **options)
        raise FULL

    scene.patch.setattr(AttemptWorker, "carry_out", late)


SCENES: dict[Cell, Callable[[Scene], None]] = {
    (SaveState.CAPTURED, Event.ASKED): goes_well,
    (SaveState.CAPTURED, Event.FAILED): cannot_be_captured,
    (SaveState.CAPTURED, Event.INTERRUPTED): is_interrupted,
    (SaveState.AGREEING, Event.OPENED): goes_well,
    (SaveState.AGREEING, Event.FAILED): is_refused_where_it_goes,
    (SaveState.AGREEING, Event.NOT_STAGED): is_not_staged_before_the_opening,
    (SaveState.AGREEING, Event.REPORTED): meets_a_fault_in_a_round,
    (SaveState.OPEN, Event.HANDED_OVER): goes_well,
    (SaveState.OPEN, Event.FAILED): does_not_see_the_draft,
    (SaveState.OPEN, Event.NOT_STAGED): is_staged_too_late,
    (SaveState.OPEN, Event.REPORTED): hears_of_a_failure_after_the_opening,
    (SaveState.WRITING, Event.HANDED_OVER): goes_in_rounds,
    (SaveState.WRITING, Event.WRITTEN): goes_well,
    (SaveState.WRITING, Event.FAILED): has_a_writer_that_takes_nothing_more,
    (SaveState.WRITING, Event.NOT_STAGED): is_not_staged_while_written,
    (SaveState.WRITING, Event.NOT_WRITTEN): is_not_written,
    (SaveState.WRITING, Event.REPORTED): is_decided_while_written,
    (SaveState.ATTESTED, Event.COMMITTED): goes_well,
    (SaveState.ATTESTED, Event.REPORTED): is_not_committed,
    (SaveState.WITHDRAWN, Event.REPORTED): does_not_see_the_draft,
    (SaveState.WITHDRAWN, Event.COMMITTED): is_given_up_behind_its_attestation,
    (SaveState.ENDED, Event.WRITTEN): is_decided_before_it_is_known_to_be_written,
    (SaveState.ENDED, Event.NOT_WRITTEN): is_decided_while_written,
}
GOES_WELL = {goes_well, goes_in_rounds, is_given_up_behind_its_attestation}


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def scene(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with monkeypatch.context() as patch:
        yield Scene(memory_path, patch)


def test_every_cell_of_the_table_has_a_scene() -> None:
    assert SCENES.keys() == TABLE.keys()


@pytest.mark.parametrize("cell", TABLE, ids=lambda cell: " ".join(cell))
def test_the_outcome_is_what_the_table_says(scene: Scene, memory_path: Path, cell: Cell) -> None:
    SCENES[cell](scene)
    error = scene.save()
    scene.demand(cell)
    assert error is None or isinstance(error, CheckpointError | KeyboardInterrupt)
    assert (error is None) == (SCENES[cell] in GOES_WELL)
    assert (scene.path / "checkpoint.json").exists() == (error is None)
    scene.patch.undo()
    again = ek.async_save(state(), memory_path / "next", options=scene.options).result(LIMIT_S)  # its arena is free, too
    assert ek.open(again.path).verify().sound
    assert [path.name for path in memory_path.glob(".c.*")] == []


@pytest.mark.parametrize("cell", TABLE, ids=lambda cell: " ".join(cell))
def test_a_save_without_its_row_fails(scene: Scene, cell: Cell) -> None:
    """It does not go on: the table drives it."""
    SCENES[cell](scene)
    scene.patch.setattr(save_states, "TABLE", {one: row for one, row in TABLE.items() if one != cell})
    error = scene.save()
    scene.demand(cell)
    if cell[0] is not SaveState.ENDED:  # it had failed before
        assert isinstance(error, InternalError)
        assert "and then" in str(error)


def test_the_table_leaves_nobody_waiting() -> None:
    """From each state a failure leads to the end, and whoever ends a save has made room or has a writer that does."""
    for state in SaveState:
        ways = {row.then for (at, _), row in TABLE.items() if at is state}
        assert ways & {SaveState.ENDED, SaveState.WITHDRAWN, SaveState.LET_GO} or state is SaveState.LET_GO
    for (at, event), row in TABLE.items():
        if at in (SaveState.OPEN, SaveState.WRITING) and event in (Event.FAILED, Event.NOT_STAGED):
            assert row.tell is TellOthers.WITHDRAW
            assert row.room is not Room.KEPT
