"""A conversion that ends in the middle goes on by the same command, and does only what was not done. [CLI-67..69]"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from elastickpt.cli.main import main
from elastickpt.commit import draft as drafts
from elastickpt.convert import conversion_draft, engine
from elastickpt.convert.conversion import open_source, prepare
from elastickpt.convert.engine import target_of
from elastickpt.convert.journal import Journal
from elastickpt.convert.nodes import nbytes_of
from elastickpt.convert.options import Options
from elastickpt.errors import Refused, WriterLost
from elastickpt.storage.local import LocalStore
from elastickpt.storage.opening import locate_for_saving
from elastickpt.storage.ranges import LocalWriter
from elastickpt.testing.faults import CHANGING, Crash, CrashAt, FaultyStore

CONSTANTS = {"num_layers": 1, "num_attention_heads": 2, "kv_channels": 2, "padded_vocab_size": 8, "swiglu": 1}
FORMS = ("universal", "megatron", "dcp", "safetensors", "torch")
QUICK = ("universal", "torch", "safetensors")  # the others differ in their files' frames only
HIDDEN = 4


@pytest.fixture
def source(tmp_path) -> Path:
    """Seven arrays of Megatron's names, in one file."""
    numbers = np.random.default_rng(7)
    shapes = {
        "embedding.word_embeddings.weight": (8, HIDDEN),
        "output_layer.weight": (8, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
        "decoder.layers.0.self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
        "decoder.layers.0.self_attention.linear_qkv.weight": (3 * HIDDEN, HIDDEN),
        "decoder.layers.0.mlp.linear_fc1.weight": (8 * HIDDEN, HIDDEN),
        "decoder.layers.0.mlp.linear_fc2.weight": (HIDDEN, 4 * HIDDEN),
    }
    (tmp_path / "source").mkdir()
    arrays = {name: numbers.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(arrays, tmp_path / "source" / "model.safetensors")
    return tmp_path / "source"


def options(source: Path, out: Path, form: str, **more) -> Options:
    megatron = {"mesh": {"tp": 2}, "constants": CONSTANTS} if form == "megatron" else {}
    return Options(str(source), str(out), target_format=form, **{**megatron, **more})


def convert(asked: Options) -> engine.Converted:
    return engine.carry_out(prepare(asked, open_source(asked)))


def files(out: Path) -> dict[str, bytes]:
    """What is in OUT but for what says when and by which attempt it was made."""
    if out.is_file():
        return {"": out.read_bytes()}
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return {path: data for path, data in found.items() if path != "checkpoint.json" and not path.startswith("fragments/")}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".out"))


@pytest.fixture
def one_thread(monkeypatch) -> None:
    """So that the nth operation is the same one in every run. No power cut is asked about here, so nothing is synced."""
    monkeypatch.setattr(engine, "THREADS", 1)
    monkeypatch.setattr(LocalWriter, "sync", lambda self: None)
    for sync in ("sync_file", "sync_directory", "sync_tree"):
        monkeypatch.setattr(LocalStore, sync, lambda self, *path: None)


class Gone:
    """The process that converts is gone at the nth operation that changes OUT's store, with a part of its bytes written."""

    def __init__(self, monkeypatch) -> None:
        self._patch = monkeypatch

    def at(self, n: int, convert_: Callable[[], object]) -> bool:
        """Whether it came so far."""
        opened: list[FaultyStore] = []

        def locate(path: str):
            store, name = locate_for_saving(path)
            opened.append(FaultyStore(store, CrashAt(n, mode="torn"), counted=CHANGING))
            return opened[-1], name

        self._patch.setattr(conversion_draft, "locate_for_saving", locate)
        try:
            convert_()
        except Crash:
            pass
        finally:
            self._patch.setattr(conversion_draft, "locate_for_saving", locate_for_saving)
            drafts._UNDER_WAY.clear()  # they were those of the process that is gone
        return opened[-1].struck is not None

    def after(self, arrays: int, convert_: Callable[[], object]) -> None:
        """It is gone once so many arrays are noted as done; of the next one all bytes are written."""
        noted, note = count(), Journal.note

        def noting(journal: Journal, task: int, left: bytes) -> None:
            if next(noted) >= arrays:
                raise Crash
            note(journal, task, left)

        self._patch.setattr(Journal, "note", noting)
        with pytest.raises(Crash):
            convert_()
        self._patch.setattr(Journal, "note", note)


@pytest.fixture
def gone(monkeypatch) -> Gone:
    return Gone(monkeypatch)


def enumerated(asked: Options, whole: Path, gone: Gone) -> list[int]:
    """How many arrays a second command found done, for each operation at which the first one may end."""
    out, beside = Path(asked.out), Path(asked.out).parent
    convert(replace(asked, out=str(whole)))
    wanted, resumed = files(whole), []
    for n in count(1):
        struck = gone.at(n, lambda: convert(asked))
        if not out.exists():
            resumed.append(convert(asked).resumed)
            assert left(beside) == []
        assert files(out) == wanted, n
        if asked.target() == "universal" and n % 5 == 0:
            assert main(["verify", str(out), "--quiet"]) == 0
        for name in ("out", *left(beside)):
            subprocess.run(["rm", "-rf", str(beside / name)], check=True)
        if not struck:
            return resumed
    raise AssertionError


@pytest.mark.parametrize("form", [*QUICK, *(pytest.param(form, marks=pytest.mark.long) for form in FORMS if form not in QUICK)])
def test_a_kill_at_any_operation_is_made_good_by_the_same_command(source, tmp_path, form, one_thread, gone) -> None:
    only = () if form == "megatron" else ("*mlp*",)
    resumed = enumerated(options(source, tmp_path / "out", form, only=only), tmp_path / "whole", gone)
    assert resumed[0] == 0
    assert set(resumed) == set(range(8 if form == "megatron" else 3))


def test_a_second_and_a_third_kill(source, tmp_path, one_thread, gone) -> None:
    asked = options(source, tmp_path / "out", "universal")
    convert(replace(asked, out=str(tmp_path / "whole")))
    for _ in range(4):  # each finds what those before did, and does one array more
        gone.after(1, lambda: convert(asked))
    assert convert(asked).resumed == 4
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert left(tmp_path) == []


# -- what is done again


class Counting:
    """A reader or writer of a store, whose ranges are counted."""

    def __init__(self, path: str, inner, ranges: list[tuple[str, int, int]]) -> None:
        self._path, self._inner, self._ranges = path, inner, ranges

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def read_into(self, offset: int, into: memoryview) -> None:
        self._ranges.append((self._path, offset, offset + into.nbytes))
        self._inner.read_into(offset, into)

    def write(self, offset: int, data: memoryview) -> None:
        self._ranges.append((self._path, offset, offset + data.nbytes))
        self._inner.write(offset, data)


@pytest.fixture
def moved(monkeypatch) -> dict[str, list[tuple[str, int, int]]]:
    """What is read and written by ranges of local stores."""
    found: dict[str, list[tuple[str, int, int]]] = {"read": [], "written": []}
    reader, writer = LocalStore.open_reader, LocalStore.open_writer
    monkeypatch.setattr(
        LocalStore, "open_reader", lambda self, path, **more: Counting(path, reader(self, path, **more), found["read"])
    )
    monkeypatch.setattr(
        LocalStore, "open_writer", lambda self, path, n: Counting(path, writer(self, path, n), found["written"])
    )
    return found


@pytest.mark.parametrize("form", FORMS)
def test_only_what_was_not_done_is_read_and_written_again(source, tmp_path, form, one_thread, gone, moved) -> None:
    asked = options(source, tmp_path / "out", form)
    head = 8 + int.from_bytes((source / "model.safetensors").read_bytes()[:8], "little")
    gone.after(3, lambda: convert(asked))
    moved["read"].clear()
    moved["written"].clear()
    job = prepare(asked, open_source(asked))
    target = target_of(job)
    assert engine.carry_out(job).resumed == 3
    again = range(3, len(target.nodes))  # one thread does them in order
    read = sum(stop - start for path, start, stop in moved["read"] if path == "model.safetensors" and start >= head)
    assert read == sum(nbytes_of(target.nodes[task]) for task in again)
    written = sum(stop - start for path, start, stop in moved["written"] if "draft.journal" not in path)
    slots = sum(target.nbytes[task] for task in again)
    if form == "universal":
        assert written == slots
    else:  # and what stands around tensors
        out = tmp_path / "out"
        whole = sum(file.stat().st_size for file in (out.rglob("*") if out.is_dir() else [out]) if file.is_file())
        assert slots <= written <= slots + whole - sum(target.nbytes)


# -- whose draft it is


CHANGES: dict[str, tuple[str, Callable[[Options, Path], Options]]] = {
    "time of a file": ("file model.safetensors", lambda asked, source: touched(asked, source)),
    "other arrays": ("option --only", lambda asked, source: replace(asked, only=("*mlp*",))),
    "another type": ("option --cast", lambda asked, source: replace(asked, casts={"value": "bfloat16"})),
    "another format": ("option --to", lambda asked, source: replace(asked, target_format="torch")),
    "another size of files": ("option --shard-size", lambda asked, source: replace(asked, shard_nbytes=1000)),
}


def touched(asked: Options, source: Path) -> Options:
    file = source / "model.safetensors"
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))
    return asked


@pytest.mark.parametrize("change", CHANGES)
def test_any_difference_is_said_and_begins_anew(source, tmp_path, change, one_thread, gone) -> None:
    asked = options(source, tmp_path / "out", "dcp")
    gone.after(3, lambda: convert(asked))
    assert len(left(tmp_path)) == 1
    words, changed = CHANGES[change]
    done = convert(changed(asked, source))
    assert done.resumed == 0
    assert len(done.said) == 1
    assert words in done.said[0]
    assert "then" in done.said[0]
    assert left(tmp_path) == []


def test_another_number_of_workers_is_no_difference(source, tmp_path, one_thread, gone) -> None:
    asked = options(source, tmp_path / "out", "universal")
    convert(replace(asked, out=str(tmp_path / "whole")))
    gone.after(3, lambda: convert(asked))
    assert convert(replace(asked, workers=2)).resumed == 3
    assert main(["diff", str(tmp_path / "out"), str(tmp_path / "whole")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0


def test_a_living_owners_draft_is_refused(source, tmp_path, one_thread, gone) -> None:
    asked = options(source, tmp_path / "out", "dcp")
    gone.after(3, lambda: convert(asked))
    (name,) = left(tmp_path)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as owner:
        held = drafts.new_draft("out", pid=owner.pid, attempt=name[-16:]).folder
        (tmp_path / name).rename(tmp_path / held)
        with pytest.raises(Refused, match=f"process {owner.pid} of this host still runs"):
            convert(asked)
        assert left(tmp_path) == [held]
        owner.communicate()
    assert convert(asked).resumed > 0


def test_a_draft_of_another_host_is_left_alone_and_named(source, tmp_path, one_thread, gone) -> None:
    asked = options(source, tmp_path / "out", "dcp")
    gone.after(3, lambda: convert(asked))
    (name,) = left(tmp_path)
    away = name.replace(".draft-", ".draft-other.")
    (tmp_path / name).rename(tmp_path / away)
    done = convert(asked)
    assert (done.resumed, len(done.said), left(tmp_path)) == (0, 1, [away])
    assert "is left alone: made on host" in done.said[0]


def test_a_sweep_leaves_a_draft_that_a_conversion_goes_on_from(source, tmp_path, one_thread, gone) -> None:
    """[SAVE-24]"""
    asked = options(source, tmp_path / "out", "universal")
    gone.after(3, lambda: convert(asked))
    (name,) = left(tmp_path)
    report = drafts.sweep(LocalStore(tmp_path), "out")
    assert report.removed == ()
    assert [(folder, "the same command goes on from it" in why) for folder, why in report.left] == [(name, True)]
    assert left(tmp_path) == [name]


@pytest.mark.parametrize("spoiled", [b"", b"{}", b"no JSON", b'{"conversion":3,"version":1}'])
def test_a_record_that_says_nothing_begins_anew(source, tmp_path, one_thread, gone, spoiled: bytes) -> None:
    asked = options(source, tmp_path / "out", "dcp")
    gone.after(3, lambda: convert(asked))
    (tmp_path / left(tmp_path)[0] / drafts.CONVERSION).write_bytes(spoiled)
    done = convert(asked)
    assert done.resumed == 0
    assert "begins anew" in done.said[0]


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_journal_that_is_torn_says_less_and_never_more(source, tmp_path, one_thread, gone, size: int) -> None:
    asked = options(source, tmp_path / "out", "universal")
    convert(replace(asked, out=str(tmp_path / "whole")))
    gone.after(3, lambda: convert(asked))
    journal = tmp_path / left(tmp_path)[0] / "draft.journal"
    data = journal.read_bytes()
    journal.write_bytes({-1: data[:-1], 0: bytes([data[0] ^ 1]) + data[1:], 1: data + b"x"}[size])
    convert(asked)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# -- real processes


def command(source: Path, out: Path, *words: str) -> list[str]:
    return [sys.executable, "-c", KILLED, "convert", str(source), str(out), "--quiet", *words]


# The main thread meets the signal itself, once its first array is noted and before the next one is read. SIGINT has its usual
# handler even where whoever began the tests ignores it, as shells do for what runs in the background.
KILLED = """
import os, signal, sys
from elastickpt.convert import engine
from elastickpt.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
give, main_process = engine._Behind.give, os.getpid()
def giving(self, nbytes, work):
    give(self, nbytes, work)
    if os.getpid() == main_process:
        self.make_room(self._limit_nbytes + 1)
        signal.raise_signal(int(os.environ["SIGNAL"]))
engine._Behind.give = giving
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_command_that_is_killed_goes_on(source, tmp_path, workers: str) -> None:
    out = tmp_path / "out"
    words = ["--to", "dcp", "--workers", workers]
    found = subprocess.run(command(source, out, *words), env={**os.environ, "SIGNAL": "9"}, check=False, capture_output=True)
    assert found.returncode == -9
    assert not out.exists()
    assert len(left(tmp_path)) == 1
    assert convert(options(source, out, "dcp", workers=int(workers))).resumed > 0
    convert(options(source, tmp_path / "whole", "dcp"))
    assert files(out) == files(tmp_path / "whole")


def test_ctrl_c_ends_with_130_and_goes_on_later(source, tmp_path) -> None:
    """[CLI-60, CLI-12]"""
    out = tmp_path / "out"
    ended = subprocess.run(command(source, out), env={**os.environ, "SIGNAL": "2"}, check=False, capture_output=True)
    assert (ended.returncode, ended.stderr.decode().split()) == (130, ["interrupted"])
    assert not out.exists()
    assert convert(options(source, out, "universal")).resumed > 0
    assert main(["verify", str(out), "--quiet"]) == 0


def test_a_worker_that_is_killed_ends_the_command_which_goes_on_later(source, tmp_path, monkeypatch) -> None:
    """It waits until it is killed, so that it can't be done before."""
    asked = options(source, tmp_path / "out", "safetensors", workers=2)
    monkeypatch.setattr(engine, "_help", lambda *args: threading.Event().wait())
    job = prepare(asked, open_source(asked))

    def kill(done: int, total: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(WriterLost, match="the same command goes on"):
        engine.carry_out(job, progress=kill)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert convert(asked).resumed > 0
    convert(options(source, tmp_path / "whole", "safetensors"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
