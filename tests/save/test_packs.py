"""Placement packed in one process: what stands on disk, and that every way to it makes the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import elastickpt as ek
from elastickpt import errors
from elastickpt.commit import attempt
from elastickpt.format.encode_fragments import decode_columns
from elastickpt.loading import verify_files
from elastickpt.saving import request
from elastickpt.saving.async_save import close_all
from elastickpt.storage.kernel import ONE_SIDED
from elastickpt.storage.local import LocalStore
from elastickpt.testing.faults import RecordingStore
from elastickpt.writer import plans
from tools import mini_reader

LIMIT_S = 60.0
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    close_all()


def state(value: float = 1.0) -> dict[str, Any]:
    """Small ones and one beyond a page's alignment, strided, without axes, without elements, of several types."""
    torch.manual_seed(int(value))
    model = nn.Sequential(nn.Linear(7, 300), nn.BatchNorm1d(300), nn.Linear(300, 1001, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 7)).sum().backward()
    optimizer.step()
    more = {
        "strided": torch.randn(40, 60).t(),
        "scalar": torch.tensor(value, dtype=torch.float64),
        "empty": torch.empty(0, 5),
        "half": torch.randn(33).to(torch.bfloat16),
        "flags": torch.arange(5) % 2 == 0,
    }
    return {"model": model, "optimizer": optimizer, "more": more, "rng": ek.RNG(), "note": {"value": value}}


def contents(path: Path) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in mini_reader.read(path).items()}


def pack_of(path: Path) -> Path:
    (found,) = (path / "packs").iterdir()
    return found


def test_a_packed_checkpoint_has_no_file_for_an_array_and_holds_what_a_plain_one_does(tmp_path: Path) -> None:
    """[FRAG-62, FRAG-65, UCF-19, UCF-100]"""
    live = state()
    info = ek.save(live, tmp_path / "packed", placement="packed")
    ek.save(live, tmp_path / "plain", placement="plain")
    names = {"checkpoint.json", "index.msgpack", "fragments", "packs", "references.json"}
    assert {p.name for p in (tmp_path / "packed").iterdir()} == names
    assert pack_of(tmp_path / "packed").name == f"{info.attempt}-00000.bin"
    assert contents(tmp_path / "packed") == contents(tmp_path / "plain")
    checkpoint = ek.open(tmp_path / "packed")
    assert checkpoint.verify().problems == ()
    assert (checkpoint.manifest.placement, checkpoint.manifest.requires) == ("packed", ("packs",))
    for columns in checkpoint.fragments():
        for piece in columns.pieces.objects():
            assert piece.offset % (4096 if piece.nbytes >= MIB else 64) == 0
    assert pack_of(tmp_path / "packed").stat().st_size % 4096 == 0


def test_it_loads_and_opens(tmp_path: Path) -> None:
    saved = state(3.0)
    ek.save(saved, tmp_path / "c", step=5, placement="packed")
    live = state(4.0)
    assert ek.load(live, tmp_path / "c").step == 5
    for name, tensor in saved["model"].state_dict().items():
        assert torch.equal(live["model"].state_dict()[name], tensor)
    assert torch.equal(live["more"]["strided"], saved["more"]["strided"])
    assert live["more"]["scalar"] == 3.0
    arrays = ek.open(tmp_path / "c").arrays
    assert np.array_equal(arrays["params/model/2.weight/value"][:], saved["model"][2].weight.detach().numpy())
    assert arrays["extra/more/empty"].shape == (0, 5)


@pytest.mark.parametrize("arena_nbytes", [None, 2 * MIB])
@pytest.mark.parametrize("executor", ["process", "thread"])
def test_a_save_beside_training_makes_the_same_bytes(tmp_path: Path, executor: Any, arena_nbytes: int | None) -> None:
    """Also in portions, in an arena that is smaller than the state. [FRAG-63]"""
    live = state()
    live["large"] = torch.randn(3 * MIB // 4 + 5)
    ek.save(live, tmp_path / "blocking", placement="packed")
    options = ek.AsyncOptions(executor=executor, arena_nbytes=arena_nbytes)
    for number in range(2):  # of a structure that is new, then known
        path = tmp_path / f"beside-{number}"
        ek.async_save(live, path, placement="packed", options=options).result(LIMIT_S)
        assert pack_of(path).read_bytes() == pack_of(tmp_path / "blocking").read_bytes()
        assert ek.open(path).verify().problems == ()


def test_one_structure_alternates_between_placements(tmp_path: Path) -> None:
    live = state()
    for number, placement in enumerate(("packed", "plain", "packed", "plain", "auto", "packed")):
        info = ek.async_save(live, tmp_path / str(number), placement=placement).result(LIMIT_S)
        found = ek.open(info.path)
        assert found.manifest.placement == ("plain" if placement == "auto" else placement)
        assert found.verify().problems == ()


def test_a_run_saves_packs_and_goes_on_from_them(tmp_path: Path) -> None:
    live = {"t": torch.zeros(50), "n": 0}
    run = ek.Run(tmp_path / "run", live, keep=ek.Keep(last=2), options=ek.RunOptions(placement="packed"))
    assert run.restore().step == 0
    for step in range(1, 5):
        live["t"].fill_(step)
        live["n"] = step
        run.save(step).result(LIMIT_S)
    run.close()
    assert ek.open(f"{tmp_path}/run@4").manifest.placement == "packed"
    assert ek.open(f"{tmp_path}/run@3").verify().problems == ()
    pack = pack_of(Path(ek.open(f"{tmp_path}/run@4").path))
    data = bytearray(pack.read_bytes())
    data[3] ^= 1
    pack.write_bytes(data)
    again = {"t": torch.zeros(50), "n": 0}
    run = ek.Run(tmp_path / "run", again, keep=ek.Keep(last=2), options=ek.RunOptions(placement="packed"))
    assert run.restore().step == 3
    assert (float(again["t"][0]), again["n"]) == (3.0, 3)
    run.close()


def test_a_pack_is_synced_by_itself_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the whole file system, however many arrays there are. [SAVE-118]"""
    store = RecordingStore(LocalStore(tmp_path))
    monkeypatch.setattr(attempt, "locate_for_saving", lambda path: (store, "c"))
    ek.save({f"t{n}": torch.ones(3) for n in range(300)}, tmp_path / "c", placement="packed")
    names = [operation.name for operation in store.operations]
    assert "sync_tree" not in names
    (pack,) = {operation.path for operation in store.operations if operation.name == "open_writer"}
    assert next(operation.path for operation in store.operations if operation.name == "writer.sync") == pack
    assert ek.open(tmp_path / "c").verify().problems == ()


def test_auto_makes_packs_of_many_files_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"t{n}": torch.full((4,), float(n)) for n in range(5)}
    monkeypatch.setattr(request, "MANY_PARTS", 5)
    for number in range(2):  # of a structure that is known, too
        info = ek.save(many, tmp_path / f"auto-{number}")
        assert ek.open(info.path).manifest.placement == "packed"
        assert any("placement 'packed'" in note and "5 pairs" in note for note in info.notes)
        assert ek.open(ek.save(many, tmp_path / f"plain-{number}", placement="plain").path).manifest.placement == "plain"
    del many["t0"]
    info = ek.save(many, tmp_path / "few")
    assert (ek.open(info.path).manifest.placement, info.notes) == ("plain", ())


@pytest.mark.parametrize("name", sorted(ONE_SIDED))
def test_auto_makes_packs_where_a_file_must_not_be_filled_from_several_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("elastickpt.storage.local.file_system", lambda path: name)
    info = ek.save({"t": torch.ones(3)}, tmp_path / "auto")
    assert ek.open(info.path).manifest.placement == "packed"
    assert any(name in note for note in info.notes)
    assert ek.open(ek.save({"t": torch.ones(3)}, tmp_path / "plain", placement="plain").path).manifest.placement == "plain"


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ek.save({"a": torch.arange(100.0), "b": torch.arange(70.0)}, tmp_path / "c", placement="packed")
    return tmp_path / "c"


def refused(path: Path) -> set[str]:
    return {problem.kind for problem in ek.open(path).verify().problems}


def test_a_pack_that_is_short_is_named(saved: Path) -> None:
    os.truncate(pack_of(saved), 4095)
    with pytest.raises(errors.WrongLength, match=pack_of(saved).name):
        ek.load({"a": torch.zeros(100), "b": torch.zeros(70)}, saved)
    assert refused(saved) == {"wrong-length"}


def test_a_pack_that_is_gone_is_named(saved: Path) -> None:
    name = pack_of(saved).name
    pack_of(saved).unlink()
    with pytest.raises(errors.MissingFile, match=name):
        ek.load({"a": torch.zeros(100), "b": torch.zeros(70)}, saved)
    assert refused(saved) == {"missing-file"}


@pytest.mark.parametrize(("at", "kind"), [(399, "checksum-mismatch"), (400, "checksum-mismatch"), (4095, "checksum-mismatch")])
def test_a_byte_of_a_piece_or_of_a_gap_is_found(saved: Path, at: int, kind: str) -> None:
    """Byte 400 lies between the pieces, 4095 behind them. [UCF-18]"""
    data = bytearray(pack_of(saved).read_bytes())
    data[at] ^= 1
    pack_of(saved).write_bytes(data)
    assert refused(saved) == {kind}


def test_threads_share_a_pack_and_find_the_same(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece's damage once, with the place of its block in the pack; what is wrong with the file once."""
    monkeypatch.setattr(verify_files, "SHARE_NBYTES", 1)
    data = bytearray(pack_of(saved).read_bytes())
    for at in (3, 450, 4095):
        data[at] ^= 1
    pack_of(saved).write_bytes(data)
    found = [problem.message for problem in ek.open(saved).verify().problems]
    assert [sum(text in message for message in found) for text in ("(file offset 0)", "(file offset 448)", "byte 4095")] == [
        1
    ] * 3
    assert len(found) == 3
    pack_of(saved).unlink()
    assert [problem.kind for problem in ek.open(saved).verify().problems] == ["missing-file"]


def test_a_lost_manifest_leaves_an_attempt(saved: Path) -> None:
    """[UCF-160]"""
    (saved / "checkpoint.json").unlink()
    with pytest.raises(errors.Uncommitted):
        ek.open(saved)


def test_a_full_device_in_the_middle_of_a_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left, and the next save works."""

    def full(self: object, offset: int, data: memoryview) -> None:
        raise errors.NoSpace("write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("elastickpt.storage.ranges.LocalWriter.write", full)
        with pytest.raises(errors.NoSpace):
            ek.save(state(), tmp_path / "c", placement="packed")
    assert list(tmp_path.iterdir()) == []
    ek.save(state(), tmp_path / "c", placement="packed")
    assert ek.open(tmp_path / "c").verify().problems == ()


@pytest.mark.parametrize("placement", ["plain", "packed"])
def test_who_writes_much_has_larger_blocks(tmp_path: Path, placement: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All maps go through the hands of who commits; a reader takes either. [FRAG-32]"""
    small, large = state(), {"one": torch.arange(300_000), **state(2.0)}
    monkeypatch.setattr(plans, "MOST_BLOCKS", 64)  # the larger state has more
    monkeypatch.setattr(plans, "MOST_SMALL_BLOCKS", 8)
    least = plans.BLOCK_NBYTES if placement == "plain" else plans.SMALL_BLOCK_NBYTES
    for name, saved, expected in (("small", small, least), ("large", large, plans.LARGE_BLOCK_NBYTES)):
        path = tmp_path / name
        ek.save(saved, path, placement=placement)
        (stored,) = (path / "fragments").iterdir()
        assert decode_columns(stored.read_bytes(), path=str(stored)).block_nbytes == expected
        assert ek.open(path).verify().problems == ()
        assert contents(path)
    model = small["model"]
    wanted = {name: one.clone() for name, one in model.state_dict().items()}
    ek.load({"model": model}, tmp_path / "large", strict="missing")
    assert any(not torch.equal(one, wanted[name]) for name, one in model.state_dict().items())
    large["one"].zero_()
    ek.load({"one": large["one"]}, tmp_path / "large", strict="missing")
    assert torch.equal(large["one"], torch.arange(300_000))
