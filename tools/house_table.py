"""How large the package is, and what a reader has to hold in mind: `python -m tools.house_table [ROOT]`, as a Markdown table.

ROOT is a checkout, to compare another revision (`git worktree add`); by default this one. The closure of a call is every module
of the package that its module imports, at its top, and so on. What one save crosses is counted of a real one, in a process of
its own that imports ROOT's package; everything else is read from the source.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SMALL = 60  # lines
CALLS = ("save", "async_save", "load", "Run")  # attributes of the package
ON_DISK = ("format/",)  # their decoders are exact about what they refuse
OTHER_MEMORIES = {  # what a process remembers that is not about the structure of a state: by what
    "commit/attempt.py _TAKEN": "folders that a save of this process has taken",
    "commit/draft.py _UNDER_WAY": "attempts of this process",
    "elastic/environment.py _TOLD": "the failure that ends this process",
    "ranks/process_group.py _KNOWN": "processes of a job",
    "ranks/process_group.py _TEAMS": "connections of a process group",
    "ranks/addresses.py _OURS": "sockets that a fork closes",
    "runs/answering.py _OPEN": "members to be ended with the process",
    "runs/prometheus.py _KNOWN": "collectors of a registry",
    "runs/run.py _OPEN": "runs to be closed with the process",
    "runs/run_team.py _COUNTS": "names of teams",
    "saving/async_save.py _GROUPS": "savers of a process group",
    "storage/several_reads.py _FREE": "the kernel's contexts of threads that ended",
    "training/composites.py _CUTS": "a tensor's class and shape",
    "training/naming.py _NONE": "nothing: it stays empty",
    "training/parameters.py _NO_STATES": "nothing: it stays empty",
    "writer/write_packs.py _KEPT": "buffers to fill",
}

# The second save of a structure beside training, by one rank.
ONE_SAVE = """
import os, tempfile, threading
from concurrent.futures import Future
import psutil, torch
import elastickpt as ek
state, made, begin = {"model": torch.nn.Linear(8, 8)}, [], Future.__init__
with tempfile.TemporaryDirectory() as folder:
    ek.async_save(state, folder + "/a", step=1).result()
    Future.__init__ = lambda self, *args: (made.append(self), begin(self, *args))[1]
    ek.async_save(state, folder + "/b", step=2).result()
    (writer,) = psutil.Process().children()
    print(f"{len(made)}, {len(threading.enumerate()) - 1} and {writer.num_threads()}, 2")
"""


def files_of(package: Path) -> dict[str, str]:
    return {str(path.relative_to(package)): path.read_text() for path in sorted(package.rglob("*.py"))}


@cache
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def _nodes(text: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(_tree(text)))


def _code_lines(text: str) -> int:
    """Lines that hold code: no comments, no blank ones, no docstrings."""
    prose: set[int] = set()
    for node in _nodes(text):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            prose |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(1 for number, line in lines if line.strip() and not line.lstrip().startswith("#") and number not in prose)


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _closure(files: dict[str, str], start: str) -> set[str]:
    """Files that a module needs, itself among them."""
    found, left = set[str](), [start]
    while left:
        module = left.pop()
        path = module.removeprefix("elastickpt.").replace(".", "/")
        file = next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in files), None)
        if file is None or file in found or not module.startswith("elastickpt."):
            continue
        found.add(file)
        left += _imported(_tree(files[file]))
    return found


def _public(files: dict[str, str]) -> dict[str, str]:
    """Attribute of the package → the module that has it."""
    for node in _tree(files["__init__.py"]).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PUBLIC":
            return {name: module for name, (module, _) in ast.literal_eval(node.value).items()}
    raise SystemExit("elastickpt/__init__.py has no _PUBLIC")


def _calls(files: dict[str, str], *names: str) -> int:
    """How often one of these is called or handed on, outside of decoders of what is on disk."""
    return sum(
        isinstance(node, ast.Attribute | ast.Name) and (node.attr if isinstance(node, ast.Attribute) else node.id) in names
        for name, text in files.items()
        if not name.startswith(ON_DISK)
        for node in _nodes(text)
    )


def _importers(files: dict[str, str]) -> dict[str, set[str]]:
    """Module file → the files that import it, wherever in them."""
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, text in files.items():
        for node in _nodes(text):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("elastickpt."):
                for module in (node.module or "", *(f"{node.module}.{one.name}" for one in node.names)):
                    path = f"{module.removeprefix('elastickpt.').replace('.', '/')}.py"
                    if path in files and path != name:
                        found[path].add(name)
    return found


def colliding(files: dict[str, str]) -> dict[str, list[str]]:
    """Names of public classes of which several modules have one, with these modules."""
    where: dict[str, list[str]] = {}
    for name, text in files.items():
        for node in _tree(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(name)
    return {word: modules for word, modules in sorted(where.items()) if len(modules) > 1}


def _carriers(files: dict[str, str]) -> list[str]:
    """Classes that hold what an attempt is, its store and its draft, and not the attempt."""
    return [
        node.name
        for text in files.values()
        for node in _nodes(text)
        if isinstance(node, ast.ClassDef)
        and {"store", "draft"} <= {ast.unparse(one.target) for one in node.body if isinstance(one, ast.AnnAssign)}
    ]


def memories(files: dict[str, str]) -> list[str]:
    """What a process remembers from call to call: names at the top of a module that are bound to a container that begins
    empty, or to an object of a class of the package that makes an OrderedDict; and functions under `cache` or `lru_cache` that
    take a structure or a plan. (What belongs to an object goes with it; other functions are remembered by small values.)"""
    trees = {name: _tree(text) for name, text in files.items()}
    every = [(name, node) for name, text in files.items() for node in _nodes(text)]
    keeping = [node.name for _, node in every if isinstance(node, ast.ClassDef) and "= OrderedDict(" in ast.unparse(node)]
    begins = re.compile(
        "|".join([r"{}|\[\]|[\w.]*(Dict|dict|Dictionary|Set|set|list|deque)\(\)", *(rf"{one}\(.*\)" for one in keeping)])
    )
    bound = [
        (name, target)
        for name, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and begins.fullmatch(ast.unparse(node.value))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    cached = [
        (name, ast.Name(node.name))
        for name, node in every
        if isinstance(node, ast.FunctionDef)
        and any(re.match(r"(?:functools\.)?(?:lru_)?cache\b", ast.unparse(one)) for one in node.decorator_list)
        and re.search("Structure|Plan", ast.unparse(node.args))
    ]
    return [f"{name} {ast.unparse(target)}" for name, target in bound + cached]


def crossed(root: Path) -> dict[str, str]:
    """What one save beside training crosses."""
    environment = {**os.environ, "PYTHONPATH": str(root.resolve())}
    done = subprocess.run(
        [sys.executable, "-c", ONE_SAVE], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    return {"futures, threads of trainer and writer, processes of one save beside training": done.stdout.strip()}


def table(root: Path) -> dict[str, str]:
    """What is counted → how much it is."""
    files = files_of(root / "elastickpt")
    lines = {name: len(text.splitlines()) for name, text in files.items()}
    found = {
        "lines": f"{sum(lines.values()):,}",
        "lines of code": f"{sum(map(_code_lines, files.values())):,}",
        "files": str(len(files)),
        f"files of at most {SMALL} lines": str(sum(count <= SMALL for count in lines.values())),
        "files with one importer": str(sum(len(found) == 1 for found in _importers(files).values())),
        "classes of one name in several files": ", ".join(f"{w} {len(found)}" for w, found in colliding(files).items())
        or "none",
        "carriers of an attempt": ", ".join(_carriers(files)),
        "caches of structures": ", ".join(sorted(set(memories(files)) - set(OTHER_MEMORIES))),
        "mailboxes that a thread works off": str(
            sum(len(re.findall(r"(?:deque|Queue)\[Callable\[\[\]|Queue\(", text)) for text in files.values())
        ),
        "packb and unpackb, not of what is on disk": str(_calls(files, "packb", "unpackb")),
        "files that start a thread": str(sum(bool(re.search(r"\b(?:Thread|Timer)\(", text)) for text in files.values())),
        "files with a pool of threads": str(sum("ThreadPoolExecutor(" in text for text in files.values())),
    }
    public = _public(files)
    for call in CALLS:
        modules = _closure(files, public[call])
        found[f"modules, lines that `{call}` imports"] = f"{len(modules)}, {sum(lines[name] for name in modules):,}"
    return found


if __name__ == "__main__":
    ROOT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
    for what, count in (table(ROOT) | crossed(ROOT)).items():
        print(f"| {what} | {count} |")
