"""The reference of what is public: its parts are there, and its examples run."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import elastickpt as ek
from elastickpt.elastic.duties import Duties
from elastickpt.testing.store_suite import StoreSuite

FUNCTIONS = {f"ek.{name}": getattr(ek, name) for name in ek.__all__ if inspect.isfunction(getattr(ek, name))}
FUNCTIONS |= {f"ek.elastic.{name}": getattr(ek.elastic, name) for name in ("join", "load_alone")}
FUNCTIONS |= {
    f"ek.elastic.checkfree.{name}": value
    for name, value in vars(ek.elastic.checkfree).items()
    if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith(ek.elastic.__name__)
}
CLASSES = {f"ek.{name}": getattr(ek, name) for name in ek.__all__ if inspect.isclass(getattr(ek, name))}
CLASSES |= {
    f"ek.elastic.{name}": getattr(ek.elastic, name) for name in ek.elastic.__all__ if inspect.isclass(getattr(ek.elastic, name))
}
# What the library calls of its own, and no page of the reference shows.
OF_THE_LIBRARY = {("SaveHandle", "staging"), ("SaveHandle", "end"), ("Run", "tell_saved"), ("RunOptions", "request")}
OF_THE_LIBRARY |= {("Job", name) for name in (*vars(Duties), "wait_until_in") if name not in ("phase", "require_good_end")}
OF_THE_LIBRARY |= {("Recovery", "begun")}
MADE_BY_A_JOB = {"ek.elastic.Recovery"}  # what only a loss makes; `PipelineTrainer` says who gets it
IN_A_JOB = ("ek.elastic.Job", "ek.elastic.PipelineTrainer")


def methods() -> Iterator[tuple[str, str, object]]:
    """Of each its name, its class and itself."""
    for name, of in CLASSES.items():
        for attribute, value in vars(of).items():
            function = getattr(value, "__func__", value)
            if (
                inspect.isfunction(function)
                and not attribute.startswith("_")
                and (of.__name__, attribute) not in OF_THE_LIBRARY
            ):
                yield f"{name}.{attribute}", name, function


METHODS = {name: function for name, _, function in methods()}
CLASS_OF = {name: of for name, of, _ in methods()}
EVERYTHING = FUNCTIONS | METHODS | CLASSES


def text_of(value: object) -> str:
    return inspect.getdoc(value) or ""


def examples_of(name: str) -> list[doctest.Example]:
    found = doctest.DocTestFinder(recurse=False).find(EVERYTHING[name], name)
    return [example for test in found for example in test.examples]


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_a_public_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    function = EVERYTHING[name]
    signature, text = inspect.signature(function), text_of(function)
    takes = [parameter for parameter in signature.parameters if parameter not in ("self", "cls")]
    described = re.findall(r"^    (\w+): ", text.partition("Args:\n")[2].partition("\n\n")[0], re.MULTILINE)
    assert described == takes
    gives = str(signature.return_annotation)
    yields = gives.startswith("Iterator") and not hasattr(function, "__wrapped__")
    assert ("Yields:\n" in text) == yields
    assert ("Returns:\n" in text) == (gives != "None" and not gives.startswith("Iterator"))
    assert "Raises:\n" in text or (name in METHODS and "\nRaises nothing" in text)


@pytest.mark.parametrize("name", METHODS)
def test_a_public_method_is_called_in_an_example(name: str) -> None:
    examples = examples_of(name) + examples_of(CLASS_OF[name])
    assert any(f".{name.rpartition('.')[2]}(" in example.source for example in examples)


def test_a_public_attribute_says_what_it_is() -> None:
    silent = [
        f"{name}.{attribute}"
        for name, of in CLASSES.items()
        for attribute, value in vars(of).items()
        if isinstance(value, property) and not attribute.startswith("_") and not text_of(value)
    ]
    assert silent == []


@pytest.mark.parametrize("name", [one for one in EVERYTHING if one not in IN_A_JOB])
def test_the_examples_of_the_reference_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a checkpoint `out/step-1000` and a run `runs/llama`, as the pages of the reference say."""
    examples = examples_of(name)
    assert examples or name in METHODS or name in MADE_BY_A_JOB
    if not examples:
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    model = torch.nn.Module()
    model.add_module("layers", torch.nn.ModuleList([torch.nn.Linear(4, 4)]))
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    ek.save(state, "out/step-1000", step=1000)
    with ek.Run("runs/llama", state) as run:
        run.restore()
        run.save(900).result()
    names: dict[str, object] = {"ek": ek, "torch": torch, "model": model, "state": state, "train_step": lambda step: 1.0}
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(doctest.DocTest(examples, names, name, None, None, None))
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", IN_A_JOB)
def test_an_example_that_is_a_script_runs_in_a_job(name: str, tmp_path: Path) -> None:
    """As the launcher starts it: what it shows is what it prints."""
    sources = [example.source for example in examples_of(name)]
    (tmp_path / "script.py").write_text(
        f"import elastickpt as ek\nimport torch\nfor source in {sources!r}:\n"
        "    exec(compile(source, __file__, 'single'), globals())  # shows values, as an interpreter does\n"
    )
    launch = "import sys; from elastickpt.cli.launch import main; sys.exit(main())"
    command = [sys.executable, "-c", launch, "--stages", "1", "--heartbeat", "60", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(example.want for example in examples_of(name))


def test_who_writes_a_store_finds_how_to_run_its_suite(tmp_path: Path) -> None:
    """The example at the head of the suite, with a store in the place of its dots."""
    head = sys.modules[StoreSuite.__module__].__doc__ or ""
    example = inspect.cleandoc("\n" + head[head.index("    class TestMyStore") : head.index("Where a store declares")])
    before = (
        "import pytest\nfrom elastickpt.storage.local import LocalStore as MyStore\n"
        "from elastickpt.testing.store_suite import StoreSuite\n"
    )
    (tmp_path / "test_my_store.py").write_text(before + example.replace("...", "tmp_path"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "an_empty_file_is_a_file",
        "test_my_store.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout
