"""What a matrix of faults in recovery came to: all jobs one after the other, a table for people, a record."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tools.bench.machine import describe

from .recovery import Verdict, carry_out
from .recovery_plans import STAGES, Fault, Plan, at_random, matrix, short, without_spares

SCHEMA_VERSION = 1
BAD = ("hang", "torn", "leak", "other")
FORMS: dict[str, Callable[[int, int], list[Plan]]] = {
    "matrix": lambda seed, count: matrix(seed),
    "spareless": lambda seed, count: without_spares(seed),
    "stops": lambda seed, count: at_random(seed, min(count, 20), stops=True),
    "random": lambda seed, count: at_random(seed, count, stops=False),
    "short": lambda seed, count: short(seed),
}
LONG = ("matrix", "spareless", "stops", "random")


def plans(forms: Sequence[str], seed: int, count: int) -> list[Plan]:
    """The jobs of these forms; `count`: how many random faults."""
    return [plan for form in forms for plan in FORMS[form](seed, count)]


def carry_out_all(found: Sequence[Plan], limit_s: float, kept: Path, tell: Callable[[str], None]) -> list[Verdict]:
    """One after the other. Blocking. Folders of bad ones are copied into `kept`."""
    verdicts: list[Verdict] = []
    for number, plan in enumerate(found):

        def keep(folder: Path, number: int = number) -> None:
            place = kept / f"{found[number].name.replace(' ', '-')}-{number}"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder, place)

        verdicts.append(carry_out(plan, limit_s=limit_s, keep=keep))
        bad = "".join(f"; {kind}: {why}" for kind, why in verdicts[-1].bad.items())
        tell(f"{number + 1} of {len(found)}: {plan.name}, {plan.cases} cases, {verdicts[-1].seconds:.0f} s{bad}")
    return verdicts


def render(verdicts: Sequence[Verdict], seed: int) -> RenderableType:
    """A row for each name of plans."""
    title = f"lost stages, {STAGES} in a pipeline, seed {seed}"
    table = Table(title=title, title_justify="left")
    for column in ("when", "jobs", "cases", *BAD, "rebuilt by", "slowest, s"):
        table.add_column(column, justify="left" if column in ("when", "rebuilt by") else "right")
    for name in dict.fromkeys(one.plan.name for one in verdicts):
        mine = [one for one in verdicts if one.plan.name == name]
        counts = [sum(kind in one.bad for one in mine) for kind in BAD]
        rungs = Counter(rung for one in mine for rung in one.rungs)
        how = ", ".join(f"{rung} {count}" for rung, count in rungs.most_common())
        slowest = max(one.slowest_s for one in mine)
        cells = [Text(str(count), style="red" if count else "") for count in counts]
        table.add_row(name, str(len(mine)), str(sum(one.plan.cases for one in mine)), *cells, how, f"{slowest:.1f}")
    bad = [Text(f"{one.plan.name}: {kind}: {why}") for one in verdicts for kind, why in one.bad.items()]
    return Group(table, *bad)


def from_json(text: str) -> tuple[list[Verdict], int]:
    """The jobs and the seed that `to_json` wrote. ValueError: something else; KeyError, TypeError: other members."""
    tree = json.loads(text)
    if not isinstance(tree, dict) or (tree.get("kind"), tree.get("schema")) != ("recovery", SCHEMA_VERSION):
        raise ValueError(f"expected a record of recoveries, schema {SCHEMA_VERSION}")
    found = []
    for job in tree["jobs"]:
        faults = tuple(Fault(**(fault | {"stages": tuple(fault["stages"])})) for fault in job["plan"]["faults"])
        plan = Plan(**(job["plan"] | {"faults": faults, "rungs": tuple(job["plan"]["rungs"])}))
        losses = tuple((step, loss) for step, loss in job["losses"])
        found.append(Verdict(**(job | {"plan": plan, "rungs": tuple(job["rungs"]), "losses": losses})))
    return found, int(tree["seed"])


def to_json(verdicts: Sequence[Verdict], seed: int, date: str) -> str:
    """The record: machine, seed, every job with its faults and what came of it."""
    record = {"schema": SCHEMA_VERSION, "kind": "recovery", "date": date, "seed": seed, "machine": asdict(describe(()))}
    return json.dumps(record | {"jobs": [asdict(one) for one in verdicts]}, indent=1) + "\n"
