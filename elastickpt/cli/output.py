"""The only way out: data on stdout, talk and a bar on stderr. Colour and width only where a terminal is. [CLI-1, CLI-2]"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper

from elastickpt.cli.grid import GridLine, Span, plain
from elastickpt.cli.text import nbytes_text, printable
from elastickpt.errors import CheckpointError, ProgramFault

_ASCII = str.maketrans({"├": "|", "└": "`", "│": "|", "─": "-", "×": "x", "…": "...", "→": "->", "–": "-", "·": "-"})


def prepare() -> None:
    """Characters that the terminal's encoding lacks are escaped, not fatal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def screen_width() -> int | None:
    """Columns of the terminal on stdout; None where there is none, so that nothing piped is ever broken."""
    if not sys.stdout.isatty():
        return None
    from rich.console import Console

    return Console(file=sys.stdout).width


def show(lines: Iterable[GridLine]) -> None:
    """Writes lines to stdout, with their styles on a terminal."""
    drawn = [[Span(_drawable(span.text), span.style) for span in line] for line in lines]
    if not sys.stdout.isatty():
        sys.stdout.writelines(plain(tuple(line)) + "\n" for line in drawn)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for line in drawn:
        console.print(Text.assemble(*((span.text, span.style) for span in line)))


def show_json(value: Mapping[str, object]) -> None:
    """Writes one JSON object and a line feed to stdout. ASCII only, so that no encoding can spoil it. [CLI-6]"""
    json.dump(value, sys.stdout, indent=2 if sys.stdout.isatty() else None, allow_nan=False)
    sys.stdout.write("\n")


def say(text: str) -> None:
    """Writes a line to stderr."""
    print(_drawable(text), file=sys.stderr)


def say_error(error: CheckpointError, *, path: str) -> None:
    """`error: <path>: <what is wrong> [<kind>]`. [CLI-3]"""
    sys.stdout.flush()  # so that a terminal shows both in order
    message = error.message if path in error.message else f"{path}: {error.message}"
    first, *rest = message.split("\n") if isinstance(error, ProgramFault) else [message]  # a line of a program, and its caret
    say("\n".join((f"error: {printable(first)} [{error.kind}]", *map(printable, rest))))


def discard_stdout() -> None:
    """After a reader has closed the pipe: what is still buffered goes nowhere, and quietly."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _drawable(text: str) -> str:
    if text.isascii():
        return text
    encoding = sys.stdout.encoding or "ascii"
    return text if encoding.lower().replace("-", "").startswith("utf") else text.translate(_ASCII)


Progress = Callable[[int, int], None]


@contextmanager
def byte_bar(path: str, *, shown: bool) -> Iterator[Progress]:
    """A bar on stderr with bytes, rate and time left, and what moves it; where it is not shown, nothing."""
    if not shown:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{nbytes_text(task.speed)}/s", style="progress.data.speed")

    name = TextColumn(escape(printable(path.rstrip("/").rpartition("/")[2])))
    columns = (name, BarColumn(), DownloadColumn(binary_units=True), Rate(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
