"""The reference of what is public: its parts are there, and its examples run."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import elastickpt as ek

FUNCTIONS = {f"ek.{name}": getattr(ek, name) for name in ek.__all__ if inspect.isfunction(getattr(ek, name))}
FUNCTIONS |= {
    f"ek.elastic.checkfree.{name}": value
    for name, value in vars(ek.elastic.checkfree).items()
    if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith(ek.elastic.__name__)
}
FUNCTIONS |= {"ek.elastic.join": ek.elastic.join, "ek.elastic.load_alone": ek.elastic.load_alone}
CLASSES = {f"ek.{name}": getattr(ek, name) for name in ek.__all__ if inspect.isclass(getattr(ek, name))}
CLASSES |= {f"ek.elastic.{name}": getattr(ek.elastic, name) for name in ("Place", "Policy", "Stage")}
OF_THE_LIBRARY = {("SaveHandle", "staging"), ("SaveHandle", "end"), ("Run", "tell_saved")}  # what ends a save calls them
WITHOUT_EXAMPLE = {"ek.AdoptReport", "ek.CheckpointInfo"}  # what functions with an example return


def methods() -> Iterator[tuple[str, object]]:
    for name in ("Run", "Checkpoint", "SaveHandle"):
        for attribute, value in vars(getattr(ek, name)).items():
            if inspect.isfunction(value) and not attribute.startswith("_") and (name, attribute) not in OF_THE_LIBRARY:
                yield f"ek.{name}.{attribute}", value


METHODS = dict(methods())


def text_of(value: object) -> str:
    return inspect.getdoc(value) or ""


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_a_public_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    function = (FUNCTIONS | METHODS)[name]
    signature, text = inspect.signature(function), text_of(function)  # type: ignore[arg-type]
    takes = [parameter for parameter in signature.parameters if parameter != "self"]
    described = re.findall(r"^    (\w+): ", text.partition("Args:\n")[2].partition("\n\n")[0], re.MULTILINE)
    assert described == takes
    gives = signature.return_annotation not in (None, "None") and not str(signature.return_annotation).startswith("Iterator")
    assert ("Returns:\n" in text) == gives
    if name in FUNCTIONS:
        assert "Raises:\n" in text


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_the_examples_of_the_reference_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a checkpoint `out/step-1000` and a run `runs/llama`, as the pages of the reference say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    model = torch.nn.Module()
    model.add_module("layers", torch.nn.ModuleList([torch.nn.Linear(4, 4)]))
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    found = doctest.DocTestFinder(recurse=False).find((FUNCTIONS | CLASSES)[name], name)
    examples = [example for test in found for example in test.examples]
    assert examples or name in WITHOUT_EXAMPLE
    if not examples:
        return
    ek.save(state, "out/step-1000", step=1000)
    with ek.Run("runs/llama", state) as run:
        run.restore()
        run.save(900).result()
    names: dict[str, object] = {"ek": ek, "torch": torch, "model": model, "state": state, "train_step": lambda step: 1.0}
    runner = doctest.DocTestRunner(verbose=False)
    for test in found:
        test.globs.clear()
        test.globs.update(names)
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
