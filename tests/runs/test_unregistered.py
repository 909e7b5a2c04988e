"""Whole checkpoints whose registers are missing, in every way: a job never begins beside them, nor sweeps them unsaid.

They can be adopted. [RUN-100..109]
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from run_actors import tree
from whole_runs import BOUND_S, OPTIONS, Place, weights

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.errors import CheckpointError, Damaged, NotACheckpoint, Refused, RunBusy, Uncommitted
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.records import AbortRegister
from elastickpt.ledger.unregistered import SHOWN_FOLDERS, folders_text
from elastickpt.runs import adopting as adopting_module
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import Store
from elastickpt.testing.faults import Crash, CrashAt, FaultyStore


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(str(tmp_path / "run") if request.param == "local" else f"memory://runs-{uuid.uuid4().hex}/run")


EPOCHS = [(5, 2, "live"), (4, 2, "live"), (3, 1, "live"), (2, 1, "live"), (1, 1, "live")]


@pytest.fixture
def two_epochs(place: Place) -> Place:
    place.job(1, 2, 3, continues=0)
    place.job(4, 5, continues=3)
    assert place.entries == EPOCHS
    return place


EVERYTHING_OF_COMMITS: dict[str, Callable[[Place], object]] = {
    "missing": lambda place: place.store.remove_tree("commits"),
    "empty": lambda place: place.lose(".*"),
}


@pytest.mark.parametrize("how", EVERYTHING_OF_COMMITS)
def test_a_run_that_lost_all_objects_is_not_begun_anew(two_epochs: Place, how: str) -> None:
    """[RUN-100]"""
    place = two_epochs
    EVERYTHING_OF_COMMITS[how](place)
    said = place.demand_refusal("5 folders hold whole checkpoints", *place.folders)
    assert place.demand_refusal() == said, "the second start is as the first"
    (path,) = re.findall(r"ek\.load\(state, '(\S+step-0000000005\.2\.1)'\)", said)
    weight = torch.zeros(50)
    ek.load({"w": weight}, path)
    assert torch.equal(weight, weights(5))


LOST = {
    "all registers": r"\d.*",
    "all objects of epochs": r"epoch-.*",
    "all objects of the newest epoch": r"epoch-2\..*|\d+-2-.*",
    "the newest epoch's own objects": r"epoch-2\..*",
    "the newest adopted object": r"epoch-2\.adopted\.json",
    "the newest start object": r"epoch-2\.start\.json",
    "the first epoch's start object": r"epoch-1\.start\.json",
    "claims": r"epoch-\d\.json",
}


@pytest.mark.parametrize("what", [one for one in LOST if one != "claims"])
def test_what_no_crash_leaves_is_refused_and_adopting_brings_all_of_it_back(
    two_epochs: Place, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """[RUN-101, RUN-102, RUN-105, RUN-106, RUN-107]"""
    place = two_epochs
    place.lose(LOST[what])
    place.demand_refusal("step-0000000005.2.1")
    report = ek.adopt(place.root)
    assert report.left == ()
    assert set(report.adopted) == report.live
    assert place.entries == EPOCHS
    assert ek.adopt(place.root).epoch == 0, "there is nothing left to do"
    place.job(6, continues=5)
    place.job(continues=6, keep=ek.Keep(last=2))
    assert [one[0] for one in place.entries] == [6, 5]
    assert main(["inspect", place.root, "--epochs"]) == 0, capsys.readouterr()


def test_lost_claims_lose_nothing(two_epochs: Place) -> None:
    two_epochs.lose(LOST["claims"])
    two_epochs.job(continues=5)
    assert two_epochs.entries == EPOCHS


def test_without_its_newest_register_a_run_goes_on_and_the_folder_waits(
    two_epochs: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a crash in the last moment of a save. [RUN-103, RUN-104]"""
    place, folder = two_epochs, "step-0000000005.2.1"
    place.lose(r"0*5-2-1\.json")
    found = place.job(continues=4, expected_notes=1)
    assert all(word in found.notes[0] for word in (folder, "step 5", "adopt"))
    assert folder in caplog.text
    place.job(continues=4, expected_notes=1)
    assert folder in place.folders
    caplog.clear()
    place.job(5, continues=4, expected_notes=1)
    assert folder not in place.folders
    (said,) = [one.getMessage() for one in caplog.records if "removed, though" in one.getMessage()]
    assert folder in said
    assert place.entries[0] == (5, 5, "live")
    place.job(continues=5)


def test_a_register_that_is_missing_below_the_newest_commit_lets_the_folder_go_with_a_word(
    two_epochs: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a crash of retention. [RUN-104]"""
    place = two_epochs
    place.lose(r"0*1-1-1\.json")
    place.job(continues=5)
    assert place.entries == EPOCHS[:-1]
    assert "step-0000000001.1.1" not in place.folders
    assert [one.levelname for one in caplog.records if "step-0000000001.1.1: removed" in one.getMessage()] == ["WARNING"]


def test_registers_of_an_older_epoch_are_adopted_back_in_time(two_epochs: Place) -> None:
    place = two_epochs
    place.lose(r"0*[123]-1-1\.json")
    assert place.entries == EPOCHS[:2]
    assert ek.adopt(place.root).epoch == 3
    assert place.entries == EPOCHS


def test_the_only_register_of_a_run_that_keeps_one_is_missed(place: Place) -> None:
    """[RUN-102]"""
    place.job(1, 2, 3, continues=0, keep=ek.Keep(last=1))
    place.job(continues=3, keep=ek.Keep(last=1))
    place.lose(r"\d.*")
    place.demand_refusal("1 folder holds" if "://" in place.root else "step-0000000003.1.1")


def test_the_link_for_people_shows_that_a_register_was_there(tmp_path: Path) -> None:
    """[RUN-102]"""
    place = Place(str(tmp_path / "run"))
    place.job(1, continues=0)
    place.lose(r"\d.*")
    place.demand_refusal("step-0000000001.1.1")


def unlinked(place: Place) -> None:
    """The first save of a first job, killed in its last moment: whole, no register, no link."""
    place.job(7, continues=0)
    place.lose(r"\d.*")
    if "://" not in place.root:
        (Path(place.root) / "latest").unlink()


def test_a_crash_of_the_very_first_save_is_gone_on_from(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """[RUN-103, RUN-104]"""
    unlinked(place)
    (folder,) = place.folders
    place.job(3, continues=0, expected_notes=1)
    place.job(6, continues=3, expected_notes=1)
    assert folder in place.folders
    place.job(9, continues=6, expected_notes=1)
    assert folder not in place.folders
    assert f"{folder}: removed" in caplog.text


def test_a_crash_of_the_very_first_save_can_be_adopted(place: Place) -> None:
    unlinked(place)
    assert ek.adopt(place.root).adopted == ("step-0000000007.1.1",)
    place.job(continues=7)


def test_a_folder_with_a_token_or_a_torn_manifest_is_no_whole_checkpoint(place: Place) -> None:
    """It is what a crash leaves."""
    unlinked(place)
    (folder,) = place.folders
    place.store.create(f"{folder}/draft.json", b"{}")
    place.store.remove_tree("commits")
    place.job(continues=0)


def test_aborted_attempts_and_folders_without_a_manifest_go_at_once(place: Place) -> None:
    unlinked(place)
    (folder,) = place.folders
    place.store.remove(f"{folder}/checkpoint.json")
    place.job(continues=0)
    assert place.folders == []


def test_what_was_abandoned_is_not_adopted_into_the_live_branch(place: Place) -> None:
    """[RUN-108]"""
    place.job(1, 5, continues=0)
    weight = torch.zeros(50)
    with ek.Run(place.root, {"w": weight}, options=OPTIONS) as run:
        run.restore(step=1)
        weight.copy_(weights(2))
        run.save(2).result(BOUND_S)
    assert place.entries == [(2, 2, "live"), (1, 1, "live"), (5, 1, "abandoned")]
    before = place.entries
    place.store.remove_tree("commits")
    report = ek.adopt(place.root)
    assert set(report.adopted) - report.live == {"step-0000000005.1.1"}
    assert place.entries == before


def test_folders_can_be_named_and_must_be_there(two_epochs: Place) -> None:
    place = two_epochs
    place.store.remove_tree("commits")
    with pytest.raises(NotACheckpoint, match=r"step-0000000006\.2\.1: expected .* it has step-0000000005\.2\.1, "):
        ek.adopt(place.root, folders=["step-0000000006.2.1"])
    report = ek.adopt(place.root, folders=[f"{place.root}/step-0000000004.2.1/"])
    assert report.adopted == ("step-0000000004.2.1",)
    assert place.entries == [(4, 2, "live")]
    assert len(place.folders) == 5


def test_a_run_that_a_job_holds_is_not_adopted_into(place: Place) -> None:
    """[RUN-105]"""
    with ek.Run(place.root, {"w": torch.zeros(50)}, options=OPTIONS) as run:
        run.restore()
        with pytest.raises(RunBusy):
            ek.adopt(place.root)
    with pytest.raises(NotACheckpoint):
        ek.adopt("/nonexistent/run")


def copied(files: dict[str, bytes | None]) -> MemoryStore:
    store = MemoryStore(f"copy-{uuid.uuid4().hex}/run")
    for path, data in sorted(files.items()):
        if data is None:
            store.make_directories(path)
        else:
            store.create(path, data)
    return store


ALL_OBJECTS, REGISTERS, NEWEST_EPOCH = ".*", r"\d.*", r"epoch-2\..*"


@pytest.mark.parametrize(
    ("lost", "operations"),
    [
        pytest.param(ALL_OBJECTS, slice(1, 1000, 4), id="all objects"),
        pytest.param(REGISTERS, slice(2, 1000, 4), id="registers"),
        pytest.param(NEWEST_EPOCH, slice(3, 1000, 4), id="newest epoch"),
        pytest.param(ALL_OBJECTS, slice(1, 1000), id="all objects, everywhere", marks=pytest.mark.long),
        pytest.param(REGISTERS, slice(1, 1000), id="registers, everywhere", marks=pytest.mark.long),
        pytest.param(NEWEST_EPOCH, slice(1, 1000), id="newest epoch, everywhere", marks=pytest.mark.long),
    ],
)
def test_an_adoption_that_is_killed_anywhere_loses_nothing_and_can_be_called_again(
    lost: str, operations: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each of these operations, until there are no more. [RUN-109]"""
    origin = Place(f"memory://origin-{uuid.uuid4().hex}/run")
    origin.job(1, 2, continues=0)
    origin.job(3, continues=2)
    wanted, folders = origin.entries, origin.folders
    origin.lose(lost)
    files = dict(tree(origin.store))
    crashes = 0
    for n in range(1000)[operations]:
        store = copied(files)
        place = Place(store.url)
        faulty = FaultyStore(store, CrashAt(n))
        with monkeypatch.context() as patch:
            patch.setattr(adopting_module, "open_store", lambda url, faulty=faulty: faulty)
            try:
                ek.adopt(place.root)
            except Crash:
                crashes += 1
            else:
                break
        with ek.Run(place.root, {"w": torch.zeros(50)}, options=OPTIONS) as run, suppress(Refused):
            assert run.restore().step == 3
        assert place.folders == folders
        ek.adopt(place.root)
        assert place.entries == wanted
    assert crashes > 20 // (operations.step or 1)


def test_an_attempt_that_somebody_aborts_meanwhile_is_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    unlinked(place)
    real = adopting_module.decide

    def aborted(store: Store, register: object) -> object:
        return real(store, AbortRegister(AttemptId(7, 1, 1), "tired"))

    monkeypatch.setattr(adopting_module, "decide", aborted)
    report = ek.adopt(place.root)
    assert (report.adopted, [one.kind for one in report.left]) == ((), [Uncommitted.kind])
    place.job(continues=0)


def test_a_start_that_the_live_branch_passes_through_is_made_again(place: Place) -> None:
    """[RUN-107]"""
    place.job(1, continues=0)
    place.job(2, continues=1)
    place.job(3, continues=2)
    place.lose(r"0*2-2-1\.json|epoch-2\.start\.json")
    place.store.remove_tree("step-0000000002.2.1")
    with (
        ek.Run(place.root, {"w": torch.zeros(50)}, options=OPTIONS) as run,
        pytest.raises(Damaged, match=r"epoch-2\.start\.json"),
    ):
        run.restore()
    assert ek.adopt(place.root).adopted == ()
    place.job(continues=3)
    assert place.entries == [(3, 3, "live"), (1, 1, "live")]


def test_many_folders_are_counted() -> None:
    ids = [AttemptId(step, 1, 1) for step in range(20)]
    text = folders_text(ids)
    assert text.startswith("step-0000000019.1.1, ")
    assert text.endswith(f" and {20 - SHOWN_FOLDERS} more")


def test_a_path_into_such_a_run_says_what_can_be_done(two_epochs: Place) -> None:
    """[RUN-59]"""
    place = two_epochs
    place.store.remove_tree("commits")
    for path in (place.root, f"{place.root}@latest", f"{place.root}@3"):
        with pytest.raises(CheckpointError, match="ckpt-convert adopt"):
            ek.open(path)
