"""`verify` against every class of damage, and the exit code of each. [CLI-10]"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from elastickpt.cli.main import main
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_fragments import decode_fragments, encode_fragments
from elastickpt.format.encode_manifest import decode_manifest, encode_manifest
from elastickpt.format.records import FileDigest, FragmentMap, Manifest
from elastickpt.loading.verify import Problem, VerifyReport

CHUNK = "params/model/head.weight/value/c.0.0"
Answer = Callable[..., tuple[int, dict[str, object]]]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def change_manifest(root: Path, **changes: object) -> None:
    """Another manifest, its digest right."""
    path = root / "checkpoint.json"
    manifest: Manifest = decode_manifest(path.read_bytes(), path="checkpoint.json")
    path.write_bytes(encode_manifest(replace(manifest, **changes)))


def change_text(root: Path, old: str, new: str) -> None:
    """A manifest that no encoder would make, its digest right."""
    path = root / "checkpoint.json"
    body = path.read_text().rpartition(',"digest":')[0].replace(old, new)
    path.write_text(f'{body},"digest":"{file_digest(body.encode())}"}}\n')


def change_fragments(root: Path, change: Callable[[FragmentMap], FragmentMap]) -> None:
    """Another fragment map of writer 0, all digests right."""
    path = root / "fragments/00000.msgpack"
    data = encode_fragments(change(decode_fragments(path.read_bytes(), path=path.name)))
    path.write_bytes(data)
    manifest = decode_manifest((root / "checkpoint.json").read_bytes(), path="checkpoint.json")
    said = FileDigest("fragments/00000.msgpack", len(data), file_digest(data))
    change_manifest(root, fragments=(said, *manifest.fragments[1:]))


def lead_out(root: Path) -> None:
    change_fragments(root, lambda m: replace(m, files=(replace(m.files[0], path="../../secret"), *m.files[1:])))


def lose_a_piece(root: Path) -> None:
    change_fragments(root, lambda m: replace(m, pieces=m.pieces[1:]))


def rename_in_document(root: Path) -> None:
    path = root / "params/model/head.weight/value/zarr.json"
    path.write_bytes(path.read_bytes().replace(b"head.weight", b"tail.weight"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit of a chunk": (lambda root: flip(root / CHUNK), "checksum-mismatch"),
    "bit of the manifest": (lambda root: flip(root / "checkpoint.json"), "checksum-mismatch"),
    "bit of the index": (lambda root: flip(root / "index.msgpack"), "checksum-mismatch"),
    "bit of a fragment file": (lambda root: flip(root / "fragments/00002.msgpack"), "checksum-mismatch"),
    "short chunk": (lambda root: truncate(root / CHUNK), "wrong-length"),
    "short manifest": (lambda root: truncate(root / "checkpoint.json"), "malformed"),
    "short index": (lambda root: truncate(root / "index.msgpack"), "wrong-length"),
    "lost chunk": (lambda root: (root / CHUNK).unlink(), "missing-file"),
    "lost index": (lambda root: (root / "index.msgpack").unlink(), "missing-file"),
    "lost fragment file": (lambda root: (root / "fragments/00003.msgpack").unlink(), "missing-file"),
    "lost document": (lambda root: (root / "params/model/zarr.json").unlink(), "missing-file"),
    "changed document": (rename_in_document, "document-mismatch"),
    "stray file": (lambda root: (root / "params/core.1234").write_bytes(b""), "stray-file"),
    "stray folder": (lambda root: (root / "old").mkdir(), "stray-file"),
    "piece that nobody wrote": (lose_a_piece, "coverage-gap"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_ends_with_3_and_is_listed_with_its_kind(name: str, damaged: Path, json_of: Answer) -> None:
    """[CLI-10, CLI-31]"""
    damage, kind = DAMAGE[name]
    damage(damaged)
    code, answer = json_of("verify", damaged)
    (found,) = answer["checkpoints"]
    assert (code, found["status"]) == (3, "damaged")
    assert kind in [problem["kind"] for problem in found["problems"]]


OTHER: dict[str, tuple[Callable[[Path], object], int, str, str]] = {
    "unknown version": (lambda root: change_text(root, '"version":1,', '"version":2,'), 4, "unsupported", "unsupported"),
    "unknown feature": (
        lambda root: change_text(root, '"requires":[]', '"requires":["teleport"]'),
        4,
        "unsupported",
        "unsupported",
    ),
    "no manifest": (lambda root: (root / "checkpoint.json").unlink(), 1, "failed", "uncommitted"),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_cannot_be_verified_has_a_code_and_an_error_of_its_own(
    name: str, damaged: Path, json_of: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    """[CLI-3, CLI-7, CLI-10]"""
    change, code, status, kind = OTHER[name]
    change(damaged)
    assert main(["verify", str(damaged)]) == code
    shown = capsys.readouterr()
    assert shown.out == f"{status}  {damaged}\n"
    assert shown.err.startswith(f"error: {damaged}: ") or shown.err.startswith(f"error: file://{damaged}: ")
    assert shown.err.endswith(f" [{kind}]\n")
    assert shown.err.count("\n") == 1
    found_code, answer = json_of("verify", damaged)
    (found,) = answer["checkpoints"]
    assert (found_code, found["status"]) == (code, status)
    assert [problem["kind"] for problem in found["problems"]] == [kind]


def test_a_path_that_leads_out_ends_with_5_and_hides_nothing_else(damaged: Path, json_of: Answer) -> None:
    """[CLI-10]"""
    lead_out(damaged)
    code, answer = json_of("verify", damaged)
    (found,) = answer["checkpoints"]
    assert (code, found["status"]) == (5, "unsafe")
    assert "unsafe" in [problem["kind"] for problem in found["problems"]]


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_drafts_files_and_plain_folders_are_no_checkpoints(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "step-9.draft-ab12").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, kind in (("step-9.draft-ab12", "uncommitted"), ("folder", "not-a-checkpoint"), ("absent", "not-a-checkpoint")):
        assert main([command, str(tmp_path / name)]) == 1
        assert capsys.readouterr().err.endswith(f" [{kind}]\n")
    assert main([command, str(tmp_path / "file")]) == 1


def test_a_sound_checkpoint_is_said_to_be_sound(four_ranks: Path, json_of: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(four_ranks)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"sound  {four_ranks}  step 7, 46 arrays, 127 files, 10.8 KiB\n"
    assert shown.err == ""  # no bar where there is no terminal [CLI-2]
    code, answer = json_of("verify", four_ranks)
    assert (code, answer["checkpoints"][0]["problems"]) == (0, [])


def test_every_problem_is_listed_not_just_the_first(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """[CLI-30]"""
    flip(damaged / CHUNK)
    truncate(damaged / "params/model/head.bias/value/c.0")
    (damaged / "junk").touch()
    assert main(["verify", str(damaged)]) == 3
    first, *listed = capsys.readouterr().out.splitlines()
    assert first.startswith(f"damaged  {damaged}  step 7, 3 problems in ")
    assert sorted(line.split()[0] for line in listed) == ["checksum-mismatch", "stray-file", "wrong-length"]
    assert any(CHUNK in line for line in listed)


def test_beyond_a_thousand_problems_the_rest_is_counted(
    four_ranks: Path, json_of: Answer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """[CLI-30]"""
    problems = tuple(Problem("stray-file", f"junk-{k}") for k in range(1234))
    monkeypatch.setattr(
        import_module("elastickpt.loading.checkpoint"),
        "verify",
        lambda opened, *, progress: VerifyReport("", 1, 1, 1, problems),
    )
    code, answer = json_of("verify", four_ranks)
    (found,) = answer["checkpoints"]
    assert (code, len(found["problems"]), found["problems_left_out"]) == (3, 1000, 234)
    main(["verify", str(four_ranks)])
    assert capsys.readouterr().out.splitlines()[-1] == "  … and 234 more"


def test_of_several_checkpoints_the_gravest_code_decides_and_each_is_reported(
    four_ranks: Path, damaged: Path, tmp_path: Path, json_of: Answer
) -> None:
    """[CLI-11]"""
    (damaged / "junk").touch()
    code, answer = json_of("verify", four_ranks, tmp_path / "absent", damaged)
    assert code == 3
    assert [one["status"] for one in answer["checkpoints"]] == ["sound", "failed", "damaged"]
    assert json_of("verify", tmp_path / "absent", four_ranks)[0] == 1


def test_control_characters_of_stray_names_are_escaped(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """[CLI-5]"""
    (damaged / "a\x1b[2Jb").touch()
    main(["verify", str(damaged)])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"a\x1b[2Jb" in shown
