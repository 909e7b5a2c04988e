"""Decisions about the package's shape that the layer contract cannot say. Read from the source, nothing is imported."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "elastickpt"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def where(path: Path, node: ast.AST | None = None) -> str:
    line = f":{node.lineno}" if isinstance(node, ast.stmt | ast.expr) else ""
    return f"{path.relative_to(PACKAGE)}{line}"


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every module name that is imported anywhere in a file, also inside functions and for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def importers(prefix: str) -> set[str]:
    return {
        where(path)
        for path, tree in TREES.items()
        for name, _ in imports(tree)
        if name == prefix or name.startswith(prefix + ".")
    }


def test_zarr_is_imported_in_one_module() -> None:
    """Its surface moves."""
    assert importers("zarr") == {"storage/arrays.py"}


def test_messages_threads_and_pools_have_one_place_each() -> None:
    """Messages in flight are of `ranks.messages`; msgpack by hand is for what is on disk. Threads, and those that share out
    work, are of `ranks.threads`, by names that begin as the package is called."""
    assert {name.partition("/")[0] for name in importers("msgpack")} == {"format"}
    assert {where(path) for path in FILES if "msgspec.msgpack" in path.read_text()} == {"ranks/messages.py"}
    for word in ("Thread(target", "ThreadPoolExecutor(", "threading.Timer("):
        assert {where(path) for path in FILES if word in path.read_text()} == {"ranks/threads.py"}
    assert not any("import queue" in path.read_text() for path in FILES)  # what a thread works off is an actor's
    made = re.compile(r"\b(?:apart|later|Pool|WorkerThread|Actor)\(\s*\"(.+?)\"")
    names = {name for path in FILES for name in made.findall(path.read_text())}
    assert len(names) > 10
    assert {name for name in names if not name.startswith("elastickpt-")} == set()


# A type that several files spell out under one name, with one meaning: what each of them says of it is the same.
SPELT_OUT_AGAIN = {"AnyArray", "Attributes", "Bytes", "FileChecksums", "Json", "Path", "Progress", "RankFailures", "Weighting"}


def names_of_types(tree: ast.Module) -> Iterator[str]:
    """Classes and aliases of types, but no type variables."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = target.id if isinstance(target, ast.Name) else ""
            if name[:1].isupper() and not name.isupper() and not ast.unparse(node.value).startswith("TypeVar("):
                yield name


def test_a_name_of_a_type_has_one_meaning() -> None:
    """Whoever meets it in another file need not ask which one it is."""
    files_of: dict[str, list[str]] = {}
    for path, tree in TREES.items():
        for name in (name for name in names_of_types(tree) if not name.startswith("_")):
            files_of.setdefault(name, []).append(where(path))
    assert {name: files for name, files in files_of.items() if len(files) > 1 and name not in SPELT_OUT_AGAIN} == {}
    assert {name for name in SPELT_OUT_AGAIN if len(files_of.get(name, ())) < 2} == set()


def test_no_public_function_is_named_like_a_package() -> None:
    packages = {path.parent.name for path in FILES if path.name == "__init__.py" and path.parent.parent == PACKAGE}
    assert packages & {"load", "open", "save", "async_save", "adopt", "trainable"} == set()


def imports_torch_for_types_only(tree: ast.Module) -> bool:
    """Whether every import of torch stands below `if TYPE_CHECKING:`."""
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = [
        node
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "torch" for alias in node.names))
    ]
    return bool(found) and all(node in guarded for node in found)


def test_torch_is_imported_only_where_live_state_is() -> None:
    layers = {name.partition("/")[0] for name in importers("torch")}
    typing_only = {where(path) for path, tree in TREES.items() if imports_torch_for_types_only(tree)}
    assert layers <= {"training", "ranks", "saving", "loading", "runs", "elastic"}
    assert {name for name in importers("torch") if name.startswith(("saving/", "loading/", "runs/"))} <= typing_only


def test_names_that_torch_keeps_private_are_used_in_training_and_ranks_only() -> None:
    """Attributes with one leading underscore of something imported from torch, by import or by attribute of a module."""
    found = set()
    for path, tree in TREES.items():
        for name, node in imports(tree):
            if name.startswith("torch") and any(part.startswith("_") for part in name.split(".")):
                found.add(where(path, node).partition("/")[0])
    assert found <= {"training", "ranks"}


def test_nothing_unpickles() -> None:
    """No load path runs code from a file."""
    found = {
        where(path, node)
        for path, tree in TREES.items()
        for name, node in imports(tree)
        if name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
    }
    calls = {
        where(path, node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "numpy.load", "np.load"}
    }
    assert (found, calls) == (set(), set())


@pytest.mark.parametrize("name", ["print", "eval", "exec", "exit", "quit"])
def test_only_the_command_line_talks_and_nothing_evaluates(name: str) -> None:
    found = {
        where(path, node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    }
    assert {place for place in found if not (name == "print" and place.startswith("cli/"))} == set()


def test_only_the_command_line_exits_and_nothing_reads_the_environment() -> None:
    found = {
        where(path, node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"sys.exit", "os.environ", "os.getenv"}
    }
    allowed = ("cli/", "elastic/environment.py", "__main__.py")
    assert {place for place in found if not place.startswith(allowed)} == set()


def test_the_package_root_is_not_imported_from_inside() -> None:
    found = {
        where(path, node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and any(alias.name == "elastickpt" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "elastickpt")
    }
    assert {place for place in found if not place.startswith("__init__.py")} == set()


def test_nothing_imports_the_testing_package_or_the_command_line() -> None:
    for layer in ("testing", "cli"):
        found = {name for name in importers(f"elastickpt.{layer}") if not name.startswith((f"{layer}/", "__main__.py"))}
        assert found == set()


def test_no_file_is_named_for_nothing() -> None:
    assert [where(path) for path in FILES if path.stem in {"utils", "util", "common", "helpers", "misc", "base"}] == []


def test_files_stay_small() -> None:
    """300 lines is the aim and 360 the end: one thing a file. Docstrings do not count."""
    assert {where(path): n for path in FILES if (n := lines_but_docstrings(path)) > 360} == {}


def lines_but_docstrings(path: Path) -> int:
    nodes = [node for node in ast.walk(TREES[path]) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    docs = [node.body[0] for node in nodes if ast.get_docstring(node, clean=False) is not None]
    return len(path.read_text().splitlines()) - sum((doc.end_lineno or 0) - doc.lineno for doc in docs)


def test_reading_a_checkpoint_imports_no_torch() -> None:
    """In a process of its own, as this one has imported torch."""
    code = (
        "import sys, elastickpt; elastickpt.open; import elastickpt.cli; "
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'zarr')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_public_names_are_these() -> None:
    tree = TREES[PACKAGE / "__init__.py"]
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    types = {"AsyncOptions", "Best", "Checkpoint", "CheckpointInfo", "Every", "Keep", "LoadReport", "PerRank", "RNG"}
    types |= {"AdoptReport", "Restored", "Run", "RunOptions", "SaveHandle", "YoungDaly"}
    public = {"__version__", "adopt", "async_save", "elastic", "errors", "load", "open", "save", "trainable"}
    assert set(names) == types | public
    assert len(names) == len(set(names))


def test_no_tensor_of_a_framework_is_named_where_files_are_read() -> None:
    """Names of layers are data, and programs of the language: `foreign`, `language` and `convert` know none. Container keys of
    files (`model`, `optimizer`, `args`) are structure."""
    parts = (
        r"layers?|decoder|encoder|embed\w*|word_embeddings|attn|attention|mlp|q_proj|k_proj|v_proj|o_proj|wq|wk|wv|wo|qkv\w*"
    )
    parts += (
        r"|linear_\w+|fc[12]|c_attn|c_proj|c_fc|lm_head|wte|wpe|ln_f|\w*layernorm|norm|output_layer|gate_proj|up_proj|down_proj"
    )
    name = re.compile(rf"(?:^|\.)(?:{parts})(?:\.|$)")
    found = [
        (where(path, node), node.value)
        for path, tree in TREES.items()
        if where(path).startswith(("foreign/", "language/", "convert/"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value
        if " " not in node.value and name.search(node.value)
    ]
    assert found == []
