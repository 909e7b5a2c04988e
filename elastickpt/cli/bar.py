"""A bar of bytes on stderr. [CLI-2]"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from elastickpt.cli.text import nbytes_text, printable

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
