"""What conversions read, and the memory that they take; what a store that fails leaves. [CLI-60]"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from noted_reads import noted_reads
from safetensors.numpy import save_file

import elastickpt as ek
from elastickpt.convert import buffers as memory
from elastickpt.convert import conversion_draft, engine
from elastickpt.convert.buffers import Buffers
from elastickpt.convert.conversion import open_source, prepare
from elastickpt.convert.options import Options
from elastickpt.convert.workers import Helpers
from elastickpt.errors import NoSpace, NotDurable
from elastickpt.format.arrays import ArrayId
from elastickpt.storage.kernel import PAGE
from elastickpt.storage.local import LocalStore
from elastickpt.storage.opening import locate_for_saving
from elastickpt.storage.ranges import LocalWriter
from elastickpt.testing.faults import CHANGING, FailAt, FaultyStore

FORMS = ("universal", "dcp", "safetensors", "torch")


@pytest.fixture
def source(tmp_path) -> Path:
    numbers = np.random.default_rng(3)
    arrays = {f"layers.{k}.weight": numbers.standard_normal((16 * (k + 1), 8)).astype(np.float32) for k in range(3)}
    (tmp_path / "source").mkdir()
    save_file(arrays, tmp_path / "source" / "model.safetensors")
    return tmp_path / "source"


def convert(asked: Options) -> engine.Converted:
    return engine.carry_out(prepare(asked, open_source(asked)))


# -- a store that fails


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_at_any_operation_leaves_nothing(source, tmp_path, monkeypatch, form: str) -> None:
    """Neither at OUT nor beside it, where room is wanted now."""
    monkeypatch.setattr(engine, "THREADS", 1)
    monkeypatch.setattr(LocalWriter, "sync", lambda self: None)  # counted all the same
    for sync in ("sync_file", "sync_directory", "sync_tree"):
        monkeypatch.setattr(LocalStore, sync, lambda self, *path: None)
    asked = Options(str(source), str(tmp_path / "out"), target_format=form)
    whole = False
    for n in count(1):
        opened: list[FaultyStore] = []

        def locate(path: str, n: int = n, opened: list[FaultyStore] = opened):
            store, name = locate_for_saving(path)
            opened.append(FaultyStore(store, FailAt(n, errno=errno.ENOSPC, mode="torn"), counted=CHANGING))
            return opened[-1], name

        monkeypatch.setattr(conversion_draft, "locate_for_saving", locate)
        try:
            convert(asked)
        except NotDurable:
            assert (tmp_path / "out").exists()  # it has its name already, and only whether that lasts is open
        except NoSpace:
            assert not (tmp_path / "out").exists(), n
            whole = True
        left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")]
        assert left == [] or "remove" in str(opened[-1].struck), (n, left, opened[-1].struck)
        if opened[-1].struck is None:
            break
        for path in tmp_path.iterdir():
            if path.name != "source":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert whole


# -- what is read


@pytest.fixture
def read(monkeypatch) -> list[tuple[str, int, int]]:
    """Ranges that are read of local files."""
    return noted_reads(monkeypatch)


@pytest.fixture
def workers_within(monkeypatch) -> None:
    """Helpers do their share in this process, one after the other, so that what they read is counted."""

    @contextmanager
    def helpers(work: Callable[..., object], number: int, progress):
        found = [work(one, progress) for one in range(1, number + 1)]
        both: Helpers = Helpers([], progress)
        both.answers = lambda: found  # type: ignore[method-assign]
        yield both

    monkeypatch.setattr(engine, "helpers", helpers)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("words", [{}, {"names": ("llama-hf",)}, {"target_format": "megatron", "mesh": {"tp": 4, "pp": 2}}])
def test_no_byte_of_a_tensor_is_read_twice_over_all_workers(
    megatron_case, tmp_path, read, workers_within, workers: int, words: dict[str, object]
) -> None:
    asked = Options(str(megatron_case.folder / "checkpoint"), str(tmp_path / "out"), workers=workers, **words)
    source = open_source(asked)
    heads = {(path, start) for path, start, _ in read}
    done = engine.carry_out(prepare(asked, source))
    tensors: dict[str, list[tuple[int, int]]] = {}
    for path, start, stop in read:
        if path.endswith(".pt") and (path, start) not in heads:
            tensors.setdefault(path, []).append((start, stop))
    assert len(tensors) == 4
    for some in tensors.values():
        assert all(stop <= start for (_, stop), (start, _) in pairwise(sorted(some)))
    assert sum(stop - start for some in tensors.values() for start, stop in some) > 0
    assert done.nbytes > 0


def interleaved(folder: Path) -> dict[str, np.ndarray]:
    """Tensors whose bytes lie between one another: views of one storage, by short runs, by long ones, and of one another."""
    import torch

    fused = torch.arange(24_000.0).reshape(1000, 24)
    wide = torch.arange(36_864.0).reshape(6, 6144)
    model = {f"short.{k}": one for k, one in enumerate(fused.chunk(3, 1))} | {
        f"long.{k}": one for k, one in enumerate(wide.chunk(3, 1))
    }
    model |= {"even": fused[:, 0::2], "odd": fused[:, 1::2], "flat": fused.reshape(-1), "turned": wide.T}
    torch.save({"model": model}, folder)
    return {name: one.numpy() for name, one in model.items()}


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_that_lie_between_those_of_others_are_read_once(tmp_path, read, workers_within, workers: int) -> None:
    truth = interleaved(tmp_path / "a.pt")
    asked = Options(str(tmp_path / "a.pt"), str(tmp_path / "u"), workers=workers)
    source = open_source(asked)
    read.clear()
    engine.carry_out(prepare(asked, source))
    ranges = sorted((start, stop) for path, start, stop in read if path.endswith("a.pt"))
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))
    assert sum(stop - start for start, stop in ranges) == 4 * (24_000 + 36_864)
    for name, one in truth.items():
        assert np.array_equal(ek.open(tmp_path / "u").read(ArrayId("params", "model", name, "value")), one), name


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_what_ranks_stack_is_read_once_wherever_the_number_stands(
    tmp_path, read, workers_within, workers: int, inner: bool
) -> None:
    """The number of a stacked array is the last dimension, or one in the middle."""
    import argparse

    import torch

    shape = (40, 6, 4) if inner else (40, 4, 2048)
    whole = torch.arange(2 * np.prod(shape), dtype=torch.float32).reshape(2, *shape)
    for tp in range(2):
        folder = tmp_path / "m" / f"mp_rank_{tp:02d}"
        folder.mkdir(parents=True)
        args = argparse.Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=1)
        torch.save({"args": args, "model": {"w": whole[tp]}, "iteration": 1}, folder / "model_optim_rng.pt")
    dims = "a/tp  b  (e=4)" if inner else "a/tp  (e=4)  b"
    (tmp_path / "my.ucl").write_text(f"ucl 1\nmesh m = pp, tp\nin model\n    w  as e.{{e}}.w  {dims}  same pp\n")
    asked = Options(str(tmp_path / "m"), str(tmp_path / "u"), workers=workers, rules=str(tmp_path / "my.ucl"))
    source = open_source(asked)
    read.clear()
    engine.carry_out(prepare(asked, source))
    for tp in range(2):
        ranges = sorted((start, stop) for path, start, stop in read if f"mp_rank_{tp:02d}" in path)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))
        assert sum(stop - start for start, stop in ranges) == 4 * np.prod(shape)
    for e in range(4):
        wanted = whole[..., e] if inner else whole[:, :, e]
        found = ek.open(tmp_path / "u").read(ArrayId("params", "model", f"e.{e}.w", "value"))
        assert np.array_equal(found, wanted.reshape(found.shape).numpy()), e


@pytest.mark.parametrize("workers", [1, 2])
def test_a_universal_source_is_read_once(source, tmp_path, read, workers_within, workers: int) -> None:
    convert(Options(str(source), str(tmp_path / "universal")))
    read.clear()
    convert(Options(str(tmp_path / "universal"), str(tmp_path / "out"), target_format="dcp", workers=workers))
    chunks = [one for one in read if "/c." in one[0]]
    assert len(chunks) == len({path for path, _, _ in chunks}) == 3
    assert sum(stop - start for _, start, stop in chunks) == 16 * 8 * 4 * (1 + 2 + 3)


# -- memory


@pytest.mark.parametrize("names", [(), ("llama-hf",)])
@pytest.mark.parametrize("form", ["universal", "megatron", "dcp", "safetensors", "torch"])
def test_memory_is_that_of_two_arrays_whatever_the_models_size(megatron_case, tmp_path, monkeypatch, form, names) -> None:
    """With what is kept free beside them set to nothing."""
    if form == "megatron" and names:
        pytest.skip("Megatron's program has no such names")
    monkeypatch.setattr(engine, "SPARE_NBYTES", 0)
    most = [0]
    take = Buffers.take

    def noting(self: Buffers, nbytes: int, phase: int = 0):
        found = take(self, nbytes, phase)
        most[0] = max(most[0], sum(block.memory.size for block in (*self._lent.values(), *self._free)))
        return found

    monkeypatch.setattr(Buffers, "take", noting)
    asked = Options(str(megatron_case.folder / "checkpoint"), str(tmp_path / "out"), target_format=form, names=names)
    job = prepare(asked, open_source(asked))
    target = engine.target_of(job)
    largest = max(map(engine.nbytes_of, target.nodes))
    engine.carry_out(job)
    assert most[0] <= 3 * (largest + 4 * PAGE), (most[0] / largest, largest)


@given(st.lists(st.tuples(st.integers(0, 3 * PAGE), st.integers(0, PAGE - 1)), max_size=20))
def test_what_is_lent_is_apart_and_lies_as_asked(wanted: list[tuple[int, int]]) -> None:
    some = Buffers(8 * PAGE)
    held: list[tuple[np.ndarray, int]] = []
    for number, (nbytes, phase) in enumerate(wanted):
        found = some.take(nbytes, phase)
        assert found.size == nbytes
        assert nbytes == 0 or memory._address(found) % PAGE == phase
        found[...] = number
        held.append((found, number))
        if number % 3 == 2:
            gone, mark = held.pop(0)
            assert (gone == mark).all()
            some.give_back(gone)
    assert all((found == number).all() for found, number in held)


def test_memory_that_two_hold_is_used_again_when_both_gave_it_back() -> None:
    some = Buffers()
    first = some.take(PAGE)
    some.hold(first)
    some.give_back(first)
    assert memory._address(some.take(PAGE)) != memory._address(first)
    some.give_back(first)
    assert memory._address(some.take(PAGE)) == memory._address(first)
