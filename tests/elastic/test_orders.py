"""The decision of a step over every order of messages, acts and deaths: the real coordinator and members. [REC-10..16]"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from explore import Broken, Explorer, Faults

from elastickpt.elastic import coordination, membership, messages
from elastickpt.elastic.job import Chosen, Gone, JobPhase, JobState
from elastickpt.elastic.membership import Duty
from elastickpt.elastic.messages import Join, Ready, View, from_member, to_member
from elastickpt.elastic.script import Position
from elastickpt.errors import Malformed
from elastickpt.ranks.messages import encode


def explored(
    stages: int, spares: int, steps: int, faults: Faults, rung: str = "stale", *, undisturbed: bool = True
) -> set[str]:
    explorer = Explorer(stages, spares, steps, faults, rung, undisturbed)
    explorer.run()
    return explorer.ends


@pytest.mark.parametrize("rung", ["stale", "rollback"])
@pytest.mark.parametrize(
    ("stages", "spares", "steps", "faults", "ends"),
    [
        (2, 1, 2, Faults(deaths=1), {""}),
        (3, 1, 1, Faults(deaths=1), {""}),
        (2, 0, 1, Faults(deaths=1), {"", "no-spare"}),
        (2, 0, 1, Faults(errors=2), {"", "step-failed"}),
        (2, 0, 2, Faults(breaks=1), {""}),
        (2, 1, 1, Faults(deaths=1, hasty=1), {""}),
        (2, 1, 1, Faults(deaths=1, bad_sources=1), {""}),
    ],
)
def test_nothing_is_torn_and_nothing_waits_for_ever(
    stages: int, spares: int, steps: int, faults: Faults, ends: set[str], rung: str
) -> None:
    """Members step behind a commit only, end at one step, and every way leads to the end of the job."""
    assert explored(stages, spares, steps, faults, rung) == ends


def test_losses_before_the_first_step_are_no_recovery() -> None:
    assert explored(2, 1, 1, Faults(deaths=1), undisturbed=False) == {"", "no-spare"}


@pytest.mark.long
@pytest.mark.parametrize("rung", ["stale", "rollback"])
@pytest.mark.parametrize(
    ("stages", "spares", "steps", "faults", "ends"),
    [
        (3, 1, 3, Faults(deaths=1), {""}),
        (2, 2, 2, Faults(deaths=2), {""}),
        (2, 1, 2, Faults(deaths=1, breaks=1, errors=1), {""}),
        (2, 2, 1, Faults(deaths=2, bad_sources=1), {""}),
    ],
)
def test_the_same_in_larger_jobs(stages: int, spares: int, steps: int, faults: Faults, ends: set[str], rung: str) -> None:
    assert explored(stages, spares, steps, faults, rung) == ends


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[None]:
    """One row of a table taken out."""
    table, none, key = request.param
    kept = table[key]
    table[key] = none
    yield
    table[key] = kept


_C, _M, _S = coordination, membership, messages


@pytest.mark.parametrize(
    ("row", "faults"),
    [
        ((_C.TABLE, _C._no_effect, (JobPhase.WORKING, Gone)), Faults(deaths=1)),
        ((_C.TABLE, _C._no_effect, (JobPhase.FORMING, Gone)), Faults(deaths=2)),
        ((_C.TABLE, _C._no_effect, (JobPhase.REBUILDING, Gone)), Faults(deaths=2)),
        ((_C.TABLE, _C._no_effect, (JobPhase.WORKING, _S.Broke)), Faults(breaks=1)),
        ((_C.TABLE, _C._no_effect, (JobPhase.WORKING, _S.Raised)), Faults(errors=1)),
        ((_C.TABLE, _C._no_effect, (JobPhase.WORKING, Ready)), Faults()),
        ((_C.TABLE, _C._no_effect, (JobPhase.REBUILDING, _S.Unbuilt)), Faults(deaths=1, bad_sources=1)),
        ((_M.TABLE, _M._no_effect, (Duty.COMPUTING, View)), Faults(deaths=1)),
        ((_M.TABLE, _M._no_effect, (Duty.DECIDING, View)), Faults(deaths=1)),
        ((_M.TABLE, _M._no_effect, (Duty.STEPPING, View)), Faults(deaths=1)),
        ((_M.TABLE, _M._no_effect, (Duty.RESTING, View)), Faults(deaths=2)),
        ((_M.TABLE, _M._no_effect, (Duty.BROKEN, View)), Faults(errors=1)),
        ((_M.TABLE, _M._no_effect, (Duty.STEPPING, _M.Took)), Faults()),
    ],
    indirect=["row"],
    ids=lambda value: f"{value[2][0]}-{value[2][1].__name__}" if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("row")
def test_with_a_row_of_a_table_taken_out_a_promise_breaks(faults: Faults) -> None:
    with pytest.raises(Broken):
        Explorer(2, 2 if faults.deaths else 0, 1, faults).run()


def test_every_event_has_a_row_in_every_state() -> None:
    assert len(coordination.TABLE) == len(JobPhase) * 14
    assert len(membership.TABLE) == len(Duty) * 13


def test_the_register_that_decides_is_said_with_a_loss() -> None:
    """Forward, if a member that lives or died may not have stepped yet behind the commit; else the step is replayed."""
    job = begun(JobState(2, epoch=1), "a", "b", "c")
    for uid in "ab":
        job, _ = coordination.after(job, (uid, Ready(job.generation, 1, norm=1.0)))
    assert (job.step, job.phase) == (1, JobPhase.WORKING)
    in_step, _ = coordination.after(job, ("a", _S.Stepped(job.generation, 1)))
    died, _ = coordination.after(in_step, Gone("b", "exit", 9))
    assert (died.decision, died.step, died.lost) == ("forward", 1, {1})
    both, _ = coordination.after(in_step, ("b", _S.Stepped(job.generation, 1)))
    later, _ = coordination.after(both, Gone("b", "exit", 9))
    assert (later.decision, later.step, later.places) == ("replay", 1, ("a", "c"))


def begun(job: JobState, *uids: str) -> JobState:
    for number, uid in enumerate(uids):
        job, _ = coordination.after(job, (uid, Join(uid, number, "host", "zone")))
    for uid in job.members:
        job, _ = coordination.after(job, (uid, _S.Formed(job.generation, True)))
    job, _ = coordination.after(job, Chosen(job.generation, ()))
    for uid in job.members:
        job, _ = coordination.after(job, (uid, _S.Rebuilt(job.generation)))
    return job


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ({"p": ("a", "x"), "q": ("b", "x"), "r": ("b", "y")}, "r"),  # neither a host nor a zone of those beside it
        ({"p": ("a", "x"), "q": ("b", "x")}, "q"),  # another host of the same zone
        ({"p": ("a", "x"), "q": ("c", "z")}, "p"),  # all the same: who came first
        ({"p": ("", ""), "q": ("", "")}, "p"),
    ],
)
def test_a_spare_is_not_to_be_lost_with_what_it_is_rebuilt_from(where: dict[str, tuple[str, str]], chosen: str) -> None:
    """[REC-17]"""
    held = {"m0": ("a", "x"), "m1": ("d", "w"), "m2": ("c", "z"), "m3": ("b", "y")}
    job = JobState(4, epoch=1)
    for uid, (host, zone) in (held | where).items():
        job, _ = coordination.after(job, (uid, Join(uid, 1, host, zone)))
    assert job.places == tuple(held)
    job, _ = coordination.after(job, Gone("m1", "exit"))
    assert job.places == ("m0", chosen, "m2", "m3")
    assert "m1" not in {uid for uid, *_ in job.where}


def test_places_have_different_batches() -> None:
    job = begun(JobState(2, epoch=1), "a", "b")
    job, _ = coordination.after(job, ("a", Ready(job.generation, 1, batch="0f")))
    job, orders = coordination.after(job, ("b", Ready(job.generation, 1, batch="f0")))
    end = orders[0].message  # type: ignore[union-attr]
    assert (end.code, end.reason) == (1, "step-failed")  # type: ignore[union-attr]
    assert "stage 0 has 0f, stage 1 has f0" in end.message  # type: ignore[union-attr]


def test_what_a_replay_cannot_mend_ends_the_job_at_once() -> None:
    """[REC-57]"""
    job = begun(JobState(2, epoch=1), "a", "b")
    replayed, _ = coordination.after(job, ("b", _S.Raised(job.generation, 1, "Traceback")))
    assert replayed.phase is JobPhase.FORMING
    ended, orders = coordination.after(job, ("b", _S.Raised(job.generation, 1, "Traceback", "another form")))
    expected = _S.End(1, "step-failed", "step 1: stage 1: another form")
    assert (ended.end, [one.message for one in orders]) == (expected, [expected, expected])  # type: ignore[union-attr]


def test_all_hear_how_far_some_were_in_the_script() -> None:
    """As they were before a rollback, too, and whether they evaluated. [REC-61]"""
    job = begun(JobState(2, epoch=1), "a", "b", "c")
    job, _ = coordination.after(job, Gone("b", "exit", 9))
    at = Position(part=2, since=1, values=(0.5, 0.25), before=1)
    for first, second in (("a", "c"), ("c", "a")):
        told, _ = coordination.after(job, (first, _S.Formed(job.generation, True, evaluating=True, position=at)))
        formed, _ = coordination.after(told, (second, _S.Formed(job.generation, True, position=Position(1, 1, met=False))))
        for rung, step in (("stale", 0), ("rollback", 0)):
            source = _S.StageSource(1, rung, path="x", step=step)  # type: ignore[arg-type]
            stands, _ = coordination.after(formed, Chosen(formed.generation, (source,)))
            for uid in "ac":
                stands, orders = coordination.after(stands, (uid, _S.Rebuilt(formed.generation)))
            (go,) = {one.message for one in orders if isinstance(getattr(one, "message", None), _S.Go)}  # type: ignore[union-attr]
            assert (go.position, go.evaluating) == (replace(at, met=False), True)


def test_a_step_that_is_lost_too_often_ends_the_job() -> None:
    job = begun(JobState(2, epoch=1, max_losses_of_step=2), "a", "b", "c", "d")
    job, _ = coordination.after(job, Gone("a", "exit", 9))
    assert job.phase is JobPhase.FORMING
    job, orders = coordination.after(job, Gone("c", "exit", 9))
    assert job.phase is JobPhase.ENDED
    assert {(order.message.code, order.message.reason) for order in orders} == {(1, "step-failed")}  # type: ignore[union-attr]


def test_a_burst_of_losses_counts_once() -> None:
    """[REC-15]"""
    job = begun(JobState(4, epoch=1, max_losses_of_step=2), "a", "b", "c", "d", "e", "f", "g", "h")
    for uid in "abc":
        job, _ = coordination.after(job, Gone(uid, "exit", 9))
    assert (job.phase, job.places, job.losses_of_step) == (JobPhase.FORMING, ("e", "f", "g", "d"), 1)
    job, _ = coordination.after(job, Gone("f", "exit", 9))
    assert job.phase is JobPhase.ENDED


def test_a_loop_that_ends_on_some_members_only() -> None:
    job = begun(JobState(2, epoch=1), "a", "b")
    job, _ = coordination.after(job, ("a", _S.Left(0)))
    job, _ = coordination.after(job, ("b", Ready(job.generation, 1)))
    assert job.end is not None
    assert (job.end.code, job.end.message) == (1, "the loop ended at stage 0 after step 0, and not at stage 1")


def test_messages_arrive_as_they_were_sent() -> None:
    ready = Ready(3, 7, "ab", 1.5, (0.25, 0.5))
    view = View(1, 2, 3, ("a", ""), (1,))
    assert from_member(encode(ready)) == ready
    assert to_member(encode(view)) == view
    assert not view.complete


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\x93\xa5Ready\x01", encode(View(1, 2, 3, (), ())), b"\xc1", b"\x92\xa4Left\xa1x", b"\x91" * 5000]
)
def test_what_is_no_message_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed, match="a message of a member"):
        from_member(data)
