"""One bit of a checkpoint flipped: a load raises, or gives bit for bit what was saved. [SAVE-6]"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from bad_contestants import DYING, UNVERIFIED, WAITING

from tools.chaos import flips
from tools.chaos.cli import main
from tools.chaos.entrants import Entrant, entrant
from tools.chaos.flips import FlipSetting, StoredFile, draw, flip_each, flipped, stored_files
from tools.chaos.records import Case, from_json

FILES = (StoredFile("empty", 0), StoredFile("large", 100_000), StoredFile("small", 10))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory if the machine has such a directory: nothing of it is lost here."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as found:
        yield Path(found)


def outcomes(who: Entrant, folder: Path, count: int, ranks: int = 1) -> list[Case]:
    return flip_each(who, FlipSetting(folder, ranks, seed=1), range(count))[0]


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["elastickpt", "elastickpt-run"])
def test_a_flipped_bit_is_detected_or_harmless(folder: Path, name: str) -> None:
    cases = outcomes(entrant(name), folder, 16, ranks=2)
    assert [case for case in cases if case.is_bad] == []
    assert {case.outcome for case in cases} <= {"detected", "harmless"}
    assert sum(case.outcome == "detected" for case in cases) >= 8, "most bytes are the state's"
    assert {case.group for case in cases} == {"a byte of all", "a byte of a file drawn first"}
    assert list(folder.iterdir()) == []


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", ["elastickpt", "elastickpt-packed"])
def test_many_flipped_bits(folder: Path, ranks: int, name: str) -> None:
    cases = outcomes(entrant(name), folder, 600, ranks)
    assert {case.outcome for case in cases} == {"detected", "harmless"}


def test_a_flip_is_one_bit_of_what_is_there_and_drawn_by_seed_and_number() -> None:
    found = [draw(FILES, 1, number) for number in range(400)]
    assert found == [draw(FILES, 1, number) for number in range(400)]
    assert found != [draw(FILES, 2, number) for number in range(400)]
    nbytes = {file.path: file.nbytes for file in FILES}
    assert all(0 <= flip.offset < nbytes[flip.path] for flip in found)
    assert {flip.bit for flip in found} == set(range(8))
    aimed = [flip for flip in found if flip.aim == "a byte of a file drawn first"]
    assert len(aimed) >= len(found) / 5
    assert {flip.path for flip in aimed} == {"large", "small"}
    assert sum(flip.path == "large" for flip in found if flip not in aimed) >= 290, "small files get few of the others"


def test_a_flipped_bit_is_put_back_whatever_happens(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    seen = []
    with suppress(KeyError), flipped(path, 1, 7):
        seen.append(path.read_bytes())
        raise KeyError
    assert (seen, path.read_bytes()) == ([b"a\xe2c"], b"abc")


def test_links_are_no_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"abc")
    (tmp_path / "latest").symlink_to("below/file")
    assert stored_files(tmp_path) == (StoredFile("below/file", 3),)


# -- what does it wrong is found -----------------------------------------------------------------------------------------


@pytest.mark.ranks
def test_a_library_that_verifies_nothing_is_found_silently_wrong(folder: Path) -> None:
    cases = outcomes(UNVERIFIED, folder, 4)
    assert {case.outcome for case in cases} == {"silently wrong"}
    assert "no step" in cases[0].detail


@pytest.mark.ranks
def test_a_load_that_does_not_end_is_found_hanging(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flips, "READER_LIMIT_S", 3.0)
    (case,) = outcomes(WAITING, folder, 1)
    assert case.outcome == "hang"
    assert "in _load_or_wait" in case.detail


@pytest.mark.ranks
def test_a_load_that_dies_is_found(folder: Path) -> None:
    (case,) = outcomes(DYING, folder, 1)
    assert (case.outcome, case.is_bad) == ("crash", True)
    assert "in _load_or_die" in case.detail


@pytest.mark.ranks
def test_one_flip_is_repeated_alone_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "flips --contestant bad_contestants:UNVERIFIED,no_such_module:X --ranks 1 --only 3 --json --where"
    assert main([*line.split(), str(folder)]) == 0, "what is found bad is not ours"
    report = from_json(capsys.readouterr().out)
    (one,) = report.tallies
    assert (one.counts, [case.number for case in one.bad]) == ({"silently wrong": 1}, [3])
    assert report.absent == {"no_such_module:X": "No module named 'no_such_module'"}
    assert list(folder.iterdir()) == []


@pytest.mark.ranks
def test_what_is_found_bad_of_ours_is_the_exit_status(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["flips", "--contestant", "elastickpt", "--ranks", "1", "--only", "1", "--json", "--where", str(folder)]
    assert main(line) == 0
    monkeypatch.setattr(flips, "READER_LIMIT_S", 0.0)
    monkeypatch.setattr(flips, "_require_whole", lambda *_: None)
    assert main(line) == 1
