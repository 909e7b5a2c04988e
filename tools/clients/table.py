"""The table of what resumes bit for bit, and of what it was tried with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

from tools.clients.case import Row

_ORDER = {"differs": 0, "fails": 1, "refused": 2, "not tried": 3}
_HEAD = """\
# Objects of other libraries, killed and resumed

`make clients`. Each case trains 6 steps in one life; then, in new processes, 3 steps, a save and an end on the spot, and from
that checkpoint the other 3. *Bit for bit*: parameters, states and options at the end equal those of the one life. *Not tried*:
it does not train on this machine, or not twice alike. *Refused*: an error of this library's, by name.
"""


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """library → installed version, "absent" for none."""
    found = {}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "absent"
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table; what did not resume comes first."""
    counts: dict[str, int] = {}
    for one in rows:
        counts[one.verdict] = counts.get(one.verdict, 0) + 1
    total = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items(), key=lambda item: -item[1]))
    tried = ", ".join(f"{name} {at}" for name, at in versions(sorted({one.package for one in rows})).items())
    lines = [_HEAD, f"{len(rows)} rows: {total}. {tried}.", "", "| library | what | processes | | |", "|---|---|---|---|---|"]
    ranked = sorted(rows, key=lambda one: (_ORDER.get(one.verdict, 9), one.package, one.name, one.processes))
    lines += [f"| {one.package} | {one.name} | {one.processes} | {one.verdict} | {one.why} |" for one in ranked]
    return "\n".join(lines) + "\n"
