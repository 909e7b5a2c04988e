"""The program around the commands: start, usage, streams, ends. [CLI-10, CLI-12]"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import elastickpt
from elastickpt.cli.exitcodes import code_of
from elastickpt.cli.main import main
from elastickpt.errors import kinds

OPENING = import_module("elastickpt.runs.opening")
PROGRAM = [sys.executable, "-m", "elastickpt"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(elastickpt.__file__).parents[1]), "TERM": "xterm-256color"}


def loaded_after(code: str) -> set[str]:
    """The top-level modules that are loaded after running this."""
    tail = "; import sys; print(*{name.partition('.')[0] for name in sys.modules}, sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + tail], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def on_terminal(*argv: object, **environment: str) -> tuple[int, str]:
    """Exit code, and what a terminal of 80 columns gets from both streams."""
    above, below = pty.openpty()
    env = {key: value for key, value in ENVIRONMENT.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    command = [*PROGRAM, *map(str, argv)]
    with subprocess.Popen(command, stdout=below, stderr=below, env=env | {"COLUMNS": "80"} | environment) as process:
        os.close(below)
        found = b""
        while True:
            try:
                data = os.read(above, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            found += data
    os.close(above)
    return process.returncode, found.decode().replace("\r\n", "\n")


def test_help_loads_nothing_heavy() -> None:
    """[CLI-4]"""
    heavy = {"torch", "zarr", "numpy", "rich", "msgpack", "fsspec"}
    assert not heavy & loaded_after("import elastickpt.cli.main")
    assert not heavy & loaded_after("from elastickpt.cli.main import main; main(['inspect', '--help'])")


@pytest.mark.parametrize("argv", [["inspect"], ["inspect", "--values", "--json"], ["verify"]])
def test_commands_load_neither_torch_nor_zarr(argv: list[str], four_ranks: Path) -> None:
    """[CLI-8]"""
    run = f"from elastickpt.cli.main import main; assert main({[*argv, str(four_ranks)]!r}) == 0"
    assert not {"torch", "zarr", "rich"} & loaded_after(run)


@pytest.mark.parametrize("argv", [["inspect", "--epochs", "--keep", "last=1"], ["inspect", "--json"], ["verify"], ["adopt"]])
def test_so_do_commands_on_a_run(argv: list[str], whole_run: Path) -> None:
    """[CLI-8]"""
    run = f"from elastickpt.cli.main import main; assert main({[*argv, str(whole_run)]!r}) == 0"
    assert not {"torch", "zarr", "rich"} & loaded_after(run)


@pytest.mark.parametrize("argv", [["--help"], ["inspect", "--help"], ["verify", "--help"], ["adopt", "--help"]])
def test_help_goes_to_stdout_with_examples(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "examples:\n  ckpt-convert " in capsys.readouterr().out


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ckpt-convert {elastickpt.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["explode"], ["verify"], ["inspect", "a", "b"], ["inspect", "a", "--format", "xml"]])
def test_bad_usage_ends_with_2_and_leaves_stdout_empty(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: ckpt-convert")


def test_every_kind_of_error_has_a_code_of_the_table() -> None:
    """[CLI-10]"""
    found: dict[int, set[str]] = {}
    for kind, cls in kinds().items():
        found.setdefault(code_of(cls), set()).add(kind)
    assert found[3] == {
        *("damaged", "malformed", "missing-file", "wrong-length", "checksum-mismatch"),
        *("coverage-gap", "coverage-overlap", "document-mismatch", "stray-file"),
    }
    assert found[4] == {"unsupported"}
    assert found[5] == {"unsafe", "limit-exceeded"}
    assert {"not-a-checkpoint", "uncommitted", "storage-failed", "no-space", "checkpoint-error"} <= found[1]
    assert set(found) == {1, 3, 4, 5}


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """[CLI-12]"""

    def interrupted(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OPENING, "open_path", interrupted)
    assert main(["verify", "x"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(OPENING, "open_path", broken)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "x"])


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_reader_that_leaves_ends_it_quietly_with_141(command: str, four_ranks: Path) -> None:
    """[CLI-12]"""
    with subprocess.Popen(
        [*PROGRAM, command, str(four_ranks)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_on_a_terminal_lines_fit_and_have_colour_unless_it_is_unwanted(four_ranks: Path) -> None:
    """[CLI-2]"""
    code, coloured = on_terminal("inspect", four_ranks)
    assert code == 0
    assert "\x1b[36m" in coloured
    code, plain = on_terminal("inspect", four_ranks, NO_COLOR="1")
    assert "\x1b[36m" not in plain
    assert "not shown on 80 columns: chunks, writers, placement (| less -S shows all)" in plain


def test_what_is_piped_is_never_cut(four_ranks: Path) -> None:
    command = [*PROGRAM, "inspect", str(four_ranks)]
    done = subprocess.run(command, env=ENVIRONMENT | {"COLUMNS": "40"}, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    assert "not shown" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) > 110


def test_verify_draws_a_bar_on_a_terminal_unless_it_is_quiet(four_ranks: Path) -> None:
    """[CLI-2]"""
    code, loud = on_terminal("verify", four_ranks)
    assert code == 0
    assert "━" in loud
    _, quiet = on_terminal("verify", four_ranks, "--quiet", NO_COLOR="1")
    assert "━" not in quiet
    assert "sound" in quiet


def test_an_encoding_without_the_characters_is_no_obstacle(odd: Path) -> None:
    command = [*PROGRAM, "inspect", str(odd)]
    done = subprocess.run(command, env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert done.stdout.isascii()
    assert b"|-- " in done.stdout
    assert rb"\u540d\u524d" in done.stdout
