"""The error tree: kinds are stable, classes cross processes as their kinds."""

from __future__ import annotations

import pytest

from elastickpt.errors import CheckpointError, RankFailure, from_report, kinds

RELEASED = {
    "0.1.0": """
        capability-missing checkpoint-error checksum-mismatch coverage-gap coverage-overlap damaged deadline-exceeded
        document-mismatch layout-unsupported limit-exceeded malformed missing-file no-space not-a-checkpoint path-occupied
        placement-unsupported rank-lost ranks-failed read-only refused replica-conflict state-mismatch storage-failed
        stray-file structure-conflict uncommitted unsafe unsupported value-not-carried wrong-length
    """
}


@pytest.mark.parametrize("release", RELEASED)
def test_kinds_of_every_release_are_still_there(release: str) -> None:
    """Programs match on them; a kind is never removed or renamed."""
    assert set(RELEASED[release].split()) <= set(kinds())


def test_every_class_has_a_kind_of_its_own() -> None:
    def classes(root: type[CheckpointError]) -> list[type[CheckpointError]]:
        return [root, *(cls for child in root.__subclasses__() for cls in classes(child))]

    assert len(kinds()) == len(classes(CheckpointError))


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_a_report_gives_back_the_class_of_its_kind(kind: str) -> None:
    error = from_report([RankFailure(3, kind, "text")])
    assert (type(error), error.kind, error.report) == (kinds()[kind], kind, (RankFailure(3, kind, "text"),))
    assert str(error) == "rank 3: text"


def test_several_failures_are_all_in_the_message() -> None:
    error = from_report([RankFailure(1, "no-space", "full"), RankFailure(0, "rank-lost", "gone")])
    assert "rank 0 (rank-lost): gone" in str(error)
    assert "rank 1 (no-space): full" in str(error)
