"""Power cuts on a real ext4: every block write of real saves is logged, and what may be left of the disk is mounted and loaded.

[SAVE-1, SAVE-3, SAVE-4, SAVE-53, SAVE-60]
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from bad_contestants import LOSING, TEARING

from tools.chaos import power
from tools.chaos.blockfile import logged_file
from tools.chaos.blocklog import SECTOR, CrashState, crash_states, images, requests
from tools.chaos.entrants import Entrant, entrant
from tools.chaos.mounts import lacking, make_file_system, mounted
from tools.chaos.ours import KEPT
from tools.chaos.records import Case

SUPERBLOCK = 1024  # its offset; it has two sectors
WHY_NOT = lacking()
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"power cuts need a disk of their own: {WHY_NOT}"),
]


def cut(who: Entrant, *, ranks: int, saves: int, states: int) -> list[Case]:
    recording = power.record(who, ranks=ranks, saves=saves)
    drawn = power.drawn_states(recording, states, seed=1)
    return power.replay(who, recording, drawn, range(len(drawn)))


def require_whole_or_absent(cases: Sequence[Case], states: int) -> None:
    """Each acknowledged checkpoint loads bit for bit, each other one does or is absent; and there were cuts on both sides."""
    assert [case for case in cases if case.is_bad] == []
    assert len(cases) == states
    assert {case.outcome for case in cases} == {"old", "new"}
    assert {case.group for case in cases} == {"nothing lost", "all unflushed lost", "a subset, torn"}


@pytest.mark.parametrize(
    ("name", "saves", "states"),
    [
        ("elastickpt", 1, 60),
        ("elastickpt-async", 1, 30),
        ("elastickpt-run", KEPT + 1, 30),
    ],  # the run's last two make room
)
def test_no_power_cut_takes_an_acknowledged_checkpoint_or_shows_half_a_one(name: str, saves: int, states: int) -> None:
    """Whether the caller writes, a process beside it, or one into a run, behind which retention removes."""
    require_whole_or_absent(cut(entrant(name), ranks=2, saves=saves, states=states), states)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["elastickpt", "elastickpt-packed"])
def test_many_power_cuts(ranks: int, name: str) -> None:
    require_whole_or_absent(cut(entrant(name), ranks=ranks, saves=3, states=600), 600)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "saves"),
    [("elastickpt-async", 3), ("elastickpt-packed-async", 3), ("elastickpt-large", 3), ("elastickpt-run", KEPT + 3)],
)
def test_many_power_cuts_of_saves_beside_training(name: str, saves: int) -> None:
    require_whole_or_absent(cut(entrant(name), ranks=2, saves=saves, states=300), 300)


# -- what does it wrong is found -----------------------------------------------------------------------------------------


def test_a_library_that_syncs_nothing_is_found_to_lose_what_it_acknowledged() -> None:
    counts = Counter(case.outcome for case in cut(LOSING, ranks=1, saves=1, states=12))
    assert counts["lost"] >= 6, counts


def test_a_library_that_overwrites_in_place_is_found_silently_wrong() -> None:
    cases = cut(TEARING, ranks=1, saves=1, states=12)
    wrong = [case for case in cases if case.outcome == "silently wrong"]
    assert len(wrong) >= 4, Counter(case.outcome for case in cases)
    assert "step 1 of job 0" in wrong[0].detail
    assert "step 2 of job 0" in wrong[0].detail


# -- the disk under observation -------------------------------------------------------------------------------------------


def test_what_the_log_says_is_what_the_disk_holds(tmp_path: Path) -> None:
    """A file synced, then its rename synced, then one that is not: each is there from its flush on, whatever is lost."""
    disk, log, folder, image = (tmp_path / name for name in ("disk", "log", "mount", "image"))
    disk.touch()
    folder.mkdir()
    with logged_file(disk, log, 8 << 20):
        make_file_system(disk)
        with mounted(disk, folder):
            start = log.stat().st_size
            for name in ("first", "second"):
                (folder / name).write_bytes(name.encode() * 5000)
                sync(folder / name)
                sync(folder)
            synced = log.stat().st_size
    written = requests(log.read_bytes())
    states = crash_states(written, start, 30, seed=3)
    seen = set()
    for state, content in zip(states, images(written, states, 8 << 20), strict=True):
        image.write_bytes(content)
        with mounted(image, folder):
            there = tuple(name for name in ("first", "second") if (folder / name).exists())
            if state.position >= synced:
                assert [(folder / name).read_bytes() for name in there] == [b"first" * 5000, b"second" * 5000]
            seen.add(there)
    assert seen == {(), ("first",), ("first", "second")}


def test_a_superblock_torn_before_its_checksum_is_repaired_and_the_journal_replayed(tmp_path: Path) -> None:
    """Its second sector holds the checksum of both: the kernel refuses such a disk, and whoever owns it has it repaired."""
    disk, log, folder, image = (tmp_path / name for name in ("disk", "log", "mount", "image"))
    disk.touch()
    folder.mkdir()
    with logged_file(disk, log, 16 << 20):
        make_file_system(disk)
        with mounted(disk, folder):
            (folder / "first").write_bytes(b"first" * 5000)
            sync(folder / "first")
            sync(folder)
            synced = log.stat().st_size
            (folder / "second").mkdir()
    written = requests(log.read_bytes())
    torn = SUPERBLOCK + SECTOR
    there = [n for n, one in enumerate(written) if one.offset < torn < one.offset + len(one.data) and one.end > synced]
    states = [CrashState(written[n].end, n, ((n, torn - written[n].offset),), "a subset, torn") for n in there]
    assert states
    for content in images(written, states, 16 << 20):
        image.write_bytes(content)
        with mounted(image, folder):
            assert (folder / "first").read_bytes() == b"first" * 5000


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
