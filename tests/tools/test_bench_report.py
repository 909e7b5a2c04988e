"""Rows are compared with the right floor, the record survives JSON, and the table and chart can be drawn from it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tools.bench import chart, floors
from tools.bench.compare import gather, rows, title
from tools.bench.machine import free_stem, in_words
from tools.bench.records import Entrant, Machine, Measure, Memory, Report, Setting, from_json, to_json
from tools.bench.state import clear, fill, small_state, wrong_pieces
from tools.bench.table import print_report

SAVE = Setting("save", "none", "disk", ranks=2, from_ranks=2, nbytes=1_000_000_000, tensors=333)
COLD = replace(SAVE, case="load", cache="cold", ranks=4, from_ranks=4)
RESHARD = replace(COLD, case="reshard", from_ranks=2)
SMALL = replace(SAVE, case="small save", nbytes=10_240_000, tensors=10_000)


def report() -> Report:
    needed = SAVE.nbytes
    return Report(
        date="2026-01-02",
        repeats=3,
        cold_by="eviction",
        machine=Machine(2, 25, (("disk", "ext4"), ("tmpfs", "tmpfs")), "Linux 6.1", "3.11.0", "2.13.0"),
        entrants=(
            Entrant("dcp", "2.13.0", "plain", "files"),
            Entrant("tc", "", "", "none", absent_because="No module named 'torch_checkpointing'"),
        ),
        measures=(
            Measure(SAVE, "dcp", (2.0, 4.0, 3.0)),
            Measure(SAVE, "raw buffered", (2.0, 2.0, 2.0)),
            Measure(SAVE, "raw direct", (1.5, 1.5, 9.0)),
            Measure(SAVE, "tc", (), error="rank 0: OSError: [Errno 22]"),
            Measure(COLD, "dcp", (2.0,), (needed,), (needed,)),
            Measure(RESHARD, "dcp", (3.0,), (2 * needed,), (needed,)),
            Measure(RESHARD, "raw buffered", (0.6,), (needed,), (needed,)),
            Measure(SMALL, "dcp", (4.0,)),
        ),
        memories=(Memory("dcp", "disk", 2, 500_000_000, 600_000_000, 550_000_000, 1_000_000),),
        notes=("left out: something: [no] room",),
    )


def test_the_floor_is_the_better_raw_median_not_the_better_single_repeat() -> None:
    assert [(each.contestant, each.of_floor) for each in rows(report().measures) if each.setting == SAVE] == [
        ("raw direct", 1.0),
        ("raw buffered", 0.75),
        ("dcp", 0.5),
        ("tc", None),
    ]


def test_the_floor_of_a_stall_is_a_copy_in_memory_and_that_of_the_whole_save_is_raw() -> None:
    stall, whole = replace(SAVE, case="stall"), replace(SAVE, case="async save")
    measures = [Measure(stall, "elastickpt", (0.5,)), Measure(stall, "memcpy", (0.4,)), Measure(stall, "raw direct", (0.1,))]
    measures += [Measure(whole, "elastickpt", (2.0,)), Measure(whole, "raw direct", (1.0,)), Measure(whole, "memcpy", (0.4,))]
    found = {(each.setting.case, each.contestant): each.of_floor for each in rows(measures)}
    assert found["stall", "elastickpt"] == pytest.approx(0.8)
    assert found["async save", "elastickpt"] == pytest.approx(0.5)


def test_the_floor_of_ones_own_memory_is_a_column_of_its_own() -> None:
    measures = [Measure(SAVE, "elastickpt", (2.0,)), Measure(SAVE, "raw 1 MiB", (1.0,)), Measure(SAVE, "raw buffered", (1.6,))]
    measures += [Measure(SAVE, "own buffered", (1.8,)), Measure(SAVE, "own direct", (1.5,))]
    found = {each.contestant: (each.of_floor, each.of_own) for each in rows(measures)}
    assert found["elastickpt"] == (0.5, 0.75)
    assert found["own direct"] == (pytest.approx(2 / 3), 1.0)


def test_the_states_own_memory_is_saved_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than one buffer's bytes, which end inside tensors."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr(floors, "BOUNCE_NBYTES", 3 << 12)
    state = small_state(rank=0, ranks=100) | {"odd": {"t": torch.zeros(5001)}}
    for way in ("buffered", "direct"):
        fill(state)
        own = floors.OwnMemory(state, way)
        try:
            own.save(state, tmp_path / way)
        except OSError:  # a file system without O_DIRECT
            assert way == "direct"
            continue
        clear(state)
        own.load(state, tmp_path / way)
        assert wrong_pieces(state) == 0


def test_a_setting_without_a_floor_has_no_ratio() -> None:
    found = rows(report().measures)
    assert [each.of_floor for each in found if each.setting == COLD] == [None]


def test_resharding_is_compared_with_the_same_contestants_same_layout_load() -> None:
    (dcp,) = (each for each in rows(report().measures) if each.setting == RESHARD and each.contestant == "dcp")
    assert dcp.of_same_layout == 1.5
    assert dcp.read_share == 2.0
    assert dcp.of_floor == pytest.approx(0.2)


def test_small_tensors_are_counted_in_milliseconds_each() -> None:
    (dcp,) = (each for each in rows(report().measures) if each.setting == SMALL)
    assert dcp.ms_per_tensor == pytest.approx(0.4)


def test_samples_of_one_contestant_become_one_measure_and_an_error_keeps_earlier_repeats() -> None:
    samples = [(SAVE, "dcp", 1.0, 10, 5, None), (SAVE, "tc", 2.0, 0, 0, None), (SAVE, "dcp", 0.0, 0, 0, "broke")]
    assert gather(samples) == (
        Measure(SAVE, "dcp", (1.0,), (10,), (5,), error="broke"),
        Measure(SAVE, "tc", (2.0,), (0,), (0,)),
    )


def test_a_record_survives_json() -> None:
    assert from_json(to_json(report())) == report()


def test_the_record_has_these_members_and_no_others() -> None:
    tree = json.loads(to_json(report()))
    members = {"schema", "date", "repeats", "cold_by", "machine", "entrants", "measures", "memories", "notes"}
    assert set(tree) == members
    assert set(tree["measures"][0]) == {
        "setting",
        "contestant",
        "seconds",
        "requested_nbytes",
        "device_nbytes",
        "error",
    }
    assert set(tree["machine"]) == {"cores", "memory_gb", "places", "system", "python", "torch"}


def test_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="expected schema 1"):
        from_json('{"schema": 2}')


def test_the_machine_is_described_in_words() -> None:
    assert in_words(report().machine) == "2-cores-25-gb-ext4-tmpfs"


def test_a_second_run_of_a_day_does_not_replace_the_first(tmp_path: Path) -> None:
    assert free_stem(tmp_path, "day") == "day"
    (tmp_path / "day.json").touch()
    (tmp_path / "day-2.json").touch()
    assert free_stem(tmp_path, "day") == "day-3"


def test_titles_say_what_was_measured() -> None:
    assert title(SAVE) == "save, 1 GB, 2 ranks, disk"
    assert title(RESHARD) == "reshard cold, 1 GB, 2 → 4 ranks, disk"
    assert title(SMALL) == "small save, 10,000 tensors, 2 ranks, disk"


def test_the_table_shows_ratios_failures_and_absences_literally() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    print_report(report(), console)
    text = console.export_text()
    for wanted in ("0.50", "2.000..4.000", "tc: failed", "absent: No module named", "[no] room", "files synced"):
        assert wanted in text


def test_a_save_that_syncs_nothing_is_marked_as_such() -> None:
    plain = replace(report(), entrants=(Entrant("dcp", "1", "", "none"),))
    for found, marked in ((plain, True), (report(), False)):
        console = Console(width=160, record=True, file=io.StringIO())
        print_report(found, console)
        assert ("dcp (not durable)" in console.export_text()) is marked


def test_the_chart_is_a_png_of_settings_that_have_a_floor(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "chart.png"
    chart.draw(report(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
