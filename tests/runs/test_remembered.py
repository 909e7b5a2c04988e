"""What a job finds out when it restores, and what it keeps, stays known to the run."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from run_actors import W, X, begun, by, committed, memory_store

import elastickpt as ek
from elastickpt.errors import Damaged, StorageFailed
from elastickpt.ledger.branch import history
from elastickpt.ledger.epochs import claim
from elastickpt.ledger.history import KeepRules, RestoreHistory, read_told
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.retention import Keep
from elastickpt.loading.session import UNDEFINED
from elastickpt.runs import restoring as restoring_module
from elastickpt.runs.upkeep import Upkeep
from elastickpt.storage.local import LocalStore

BOUND_S = 60.0
OPTIONS = ek.RunOptions(signals={}, take_over=True)
Open = Callable[..., ek.Run]
ONE, TWO, THREE = (AttemptId(step, 1, 1) for step in (1, 2, 3))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def open_run(root: Path) -> Iterator[Open]:
    runs: list[ek.Run] = []

    def make(keep: Keep | None = None) -> ek.Run:
        runs.append(ek.Run(root, {"w": torch.zeros(300)}, keep=keep, options=OPTIONS))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


@pytest.fixture
def three_steps(root: Path, open_run: Open) -> Path:
    run = open_run()
    run.restore()
    for step in (1, 2, 3):
        run.save(step).result(BOUND_S)
    run.close()
    return root


def flip(root: Path, step: int) -> None:
    """One bit of its data; the second time it is whole again."""
    (chunk,) = root.glob(f"step-{step:010d}.1.1/extra/w/c.0")
    data = bytearray(chunk.read_bytes())
    data[700] ^= 1
    chunk.write_bytes(data)


def told_of(root: Path) -> RestoreHistory:
    return complete(read_told(LocalStore(root)))


def outcomes(root: Path) -> dict[AttemptId, str]:
    return {one: found.outcome for one, found in told_of(root).findings.items()}


def test_what_was_passed_over_and_what_was_loaded_is_remembered(three_steps: Path, open_run: Open) -> None:
    """[RUN-66]"""
    assert outcomes(three_steps) == {}  # the first job had nothing to load
    flip(three_steps, 3)
    found = open_run().restore()
    assert (found.step, [(one.step, one.kind) for one in found.skipped]) == (2, [(3, "checksum-mismatch")])
    told = told_of(three_steps).findings
    assert {one: (it.outcome, it.epoch, it.kind) for one, it in told.items()} == {
        TWO: ("verified", 2, ""),
        THREE: ("damaged", 2, "checksum-mismatch"),
    }
    assert told[THREE].message == found.skipped[0].reason
    assert all(word in told[THREE].message for word in ("extra/w/c.0", "block 0"))
    assert UNDEFINED not in told[THREE].message


def test_one_that_cannot_even_be_opened_is_remembered(three_steps: Path, open_run: Open) -> None:
    """[RUN-66]"""
    shutil.rmtree(three_steps / "step-0000000003.1.1")
    (three_steps / "step-0000000002.1.1" / "checkpoint.json").write_bytes(b"{}")
    assert open_run().restore().step == 1
    assert outcomes(three_steps) == {ONE: "verified", TWO: "damaged", THREE: "damaged"}


def test_what_the_store_could_not_read_is_remembered_as_unread(
    three_steps: Path, open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = restoring_module.load

    def load(state: object, path: str, **about: object) -> object:
        if "0003" in path:
            raise StorageFailed("stale handle")
        return real(state, path, **about)  # type: ignore[arg-type]

    monkeypatch.setattr(restoring_module, "load", load)
    open_run().restore()
    assert outcomes(three_steps) == {TWO: "verified", THREE: "unread"}


def test_a_mark_keeps_nobody_from_what_was_repaired(three_steps: Path, open_run: Open) -> None:
    """[RUN-67]"""
    flip(three_steps, 3)
    open_run().restore()
    flip(three_steps, 3)
    assert outcomes(three_steps)[THREE] == "damaged"
    assert open_run().restore(step=3, epoch=1).step == 3
    assert outcomes(three_steps) == {TWO: "verified", THREE: "verified"}


def test_a_message_is_cut_and_made_text(three_steps: Path, open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files need not be valid text, and a restore must not fail for what it remembers. [RUN-66]"""
    real = restoring_module.load

    def load(state: object, path: str, **about: object) -> object:
        if "0003" in path:
            raise Damaged("a name \udc80" + "x" * 10_000)
        return real(state, path, **about)  # type: ignore[arg-type]

    monkeypatch.setattr(restoring_module, "load", load)
    (skipped,) = open_run().restore().skipped
    assert skipped.reason == r"a name \udc80" + "x" * 10_000
    message = told_of(three_steps).findings[THREE].message
    assert message.startswith(r"a name \udc80xxx")
    assert len(message) == restoring_module.MAX_MESSAGE


def test_of_very_many_the_newest_are_remembered(three_steps: Path, open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring_module, "MAX_PASSED", 1)
    flip(three_steps, 3)
    flip(three_steps, 2)
    assert len(open_run().restore().skipped) == 2
    assert outcomes(three_steps) == {ONE: "verified", THREE: "damaged"}


def test_where_nothing_loads_what_was_passed_over_is_told_and_the_content_is_undefined(
    three_steps: Path, open_run: Open
) -> None:
    """[RUN-69]"""
    for step in (1, 2, 3):
        flip(three_steps, step)
    with pytest.raises(Damaged, match="none of 3 checkpoints loads") as raised:
        open_run().restore()
    assert raised.value.message.endswith(UNDEFINED)
    assert outcomes(three_steps) == dict.fromkeys((ONE, TWO, THREE), "damaged")
    assert not (three_steps / "commits" / "epoch-2.start.json").exists()
    flip(three_steps, 2)
    assert open_run().restore().step == 2
    assert outcomes(three_steps) == {ONE: "damaged", TWO: "verified", THREE: "damaged"}


def test_what_cannot_be_remembered_changes_no_error(
    three_steps: Path, open_run: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[RUN-69]"""
    for step in (1, 2, 3):
        flip(three_steps, step)

    def remember(*about: object) -> object:
        raise StorageFailed("disk full")
        yield

    monkeypatch.setattr(restoring_module, "remember", remember)
    with pytest.raises(Damaged, match="none of 3 checkpoints loads"):
        open_run().restore()
    assert "cannot be remembered: disk full" in caplog.text
    assert told_of(three_steps).findings == {}


def test_a_found_object_that_is_not_what_was_written_tells_nothing(three_steps: Path, open_run: Open) -> None:
    for step in (1, 2, 3):
        flip(three_steps, step)
    with pytest.raises(Damaged):
        open_run().restore()
    (three_steps / "commits" / "epoch-2.found.json").write_bytes(b"{}")
    assert told_of(three_steps).findings == {}


def test_what_a_job_keeps_is_remembered(root: Path, open_run: Open) -> None:
    """[RUN-65]"""
    open_run().restore()
    assert told_of(root).rules == KeepRules(1, "all")
    run = open_run(ek.Keep(last=3, every=1000, best=ek.Best("loss", 2, mode="min")))
    run.restore()
    run.restore()
    assert told_of(root).rules == KeepRules(3, "last=3,every=1000,best=loss:2:min")


def test_one_checkpoint_passed_over_is_one_warning(three_steps: Path, open_run: Open, caplog: pytest.LogCaptureFixture) -> None:
    flip(three_steps, 3)
    shutil.rmtree(three_steps / "step-0000000002.1.1")
    with caplog.at_level(logging.WARNING):
        assert open_run().restore().step == 1
    told = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(told) == 2
    assert [sum(f"step-000000000{step}.1.1: passed over" in one for one in told) for step in (2, 3)] == [1, 1]


# -- a job's own rollback --------------------------------------------------------------------------------------------------


def upkeep_behind_a_claim(*tokens: str) -> None:
    """The upkeep of a job of epoch 1 comes behind the claim of epoch 2, of token-2; the job's own tokens are `tokens`."""
    store = memory_store()
    holding = begun(store, job=1)
    assert [committed(store, holding, step=step) for step in (10, 20)] == [W, X]
    upkeep = Upkeep(store, Keep(last=1))
    for token in tokens:
        upkeep.claiming(token)
    complete(claim(store, by(2)))
    upkeep.started(holding, verified={})
    upkeep.committed()
    upkeep.add_metrics(20, {"loss": 1.0})
    done = threading.Event()
    upkeep.call(done.set)
    assert done.wait(BOUND_S)
    upkeep.close(limit_s=BOUND_S)
    assert store.exists(f"commits/{W.register}")  # nothing was removed


def test_that_another_job_has_the_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    upkeep_behind_a_claim("token-1")
    assert sum("epoch 1 of this job was superseded by epoch 2 (host host2" in text for text in caplog.messages) == 3


def test_that_a_job_rolled_back_itself_is_no_news_but_what_it_lost_is(caplog: pytest.LogCaptureFixture) -> None:
    upkeep_behind_a_claim("token-1", "token-2")
    assert [text.partition(": ")[2] for text in caplog.messages] == ["a rollback came before the metrics of step 20 were added"]


def test_a_rollback_warns_of_nothing(root: Path, open_run: Open, caplog: pytest.LogCaptureFixture) -> None:
    """Its upkeep of the epoch before is held up until the claim has come."""
    run = open_run(ek.Keep(last=1))
    run.restore()
    let = threading.Event()

    def held_up() -> None:
        assert let.wait(BOUND_S)

    run._upkeep.call(held_up)
    for step in (1, 2, 3):
        run.save(step).result(BOUND_S)
    run.restore(step=2)
    let.set()
    run.close()
    assert caplog.messages == []
    assert [(entry.step, entry.state) for entry in history(root)] == [(2, "live"), (3, "abandoned")]
