"""What the table of the house counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import house_table


@pytest.fixture
def root(tmp_path: Path) -> Path:
    package = tmp_path / "elastickpt"
    (package / "format").mkdir(parents=True)
    public = ", ".join(f"{name!r}: ('elastickpt.engine', {name!r})" for name in house_table.CALLS)
    (package / "__init__.py").write_text(f'"""A package."""\n\n_PUBLIC = {{{public}}}\n')
    (package / "engine.py").write_text(
        "# a comment\nfrom elastickpt.format import disk\n\n\ndef save():\n    return disk.read\n"
    )
    (package / "format" / "disk.py").write_text("import msgpack\n\nread = msgpack.unpackb\n")
    (package / "apart.py").write_text("import msgpack\n\n\ndef f(x):\n    return msgpack.packb(x), msgpack.unpackb\n")
    return tmp_path


def test_only_what_an_entry_imports_is_in_its_closure(root: Path) -> None:
    assert house_table.table(root)["modules, lines that `save` imports"] == "2, 9"


def test_code_is_counted_without_prose_and_calls_without_what_is_on_disk(root: Path) -> None:
    found = house_table.table(root)
    assert (found["files"], found["lines"], found["lines of code"]) == ("4", "17", "9")
    assert found["packb and unpackb, not of what is on disk"] == "2"


def test_files_with_one_importer_and_words_of_two_meanings_are_found(root: Path) -> None:
    (root / "elastickpt" / "beside.py").write_text("class Word:\n    pass\n")
    (root / "elastickpt" / "apart.py").write_text("class Word:\n    pass\n\n\nclass _Own:\n    pass\n")
    found = house_table.table(root)
    assert found["files with one importer"] == "1"  # the module of `format`, by the engine
    assert found["classes of one name in several files"] == "Word 2"


def test_who_holds_the_fields_of_an_attempt_and_not_the_attempt_is_a_carrier(root: Path) -> None:
    attempt, order = "class Attempt:\n    store: str\n    draft: str\n", "class Order:\n    attempt: Attempt\n"
    (root / "elastickpt" / "attempt.py").write_text(f"{attempt}\n\n{order}")
    assert house_table.table(root)["carriers of an attempt"] == "Attempt"


def test_whatever_a_process_remembers_is_a_cache_of_structures_until_it_is_said_of_what_else(root: Path) -> None:
    (root / "elastickpt" / "memories.py").write_text(
        "_SEEN: dict[str, int] = {}\n_SPANS = _Spans()\n_NAMES = ('a', 'b')\n_TEAMS = weakref.WeakKeyDictionary()\n\n\n"
        "class _Spans:\n    def __init__(self):\n        self._known: OrderedDict[int, str] = OrderedDict()\n\n\n"
        "@lru_cache(maxsize=4)\ndef of_plan(plan: WritePlan):\n    return plan\n\n\n"
        "@cache\ndef of_number(n: int):\n    return n\n"
    )
    found = house_table.table(root)["caches of structures"]
    assert found == ", ".join(f"memories.py {name}" for name in ("_SEEN", "_SPANS", "_TEAMS", "of_plan"))


def test_this_package_has_one_cache_of_structures_one_carrier_and_one_mailbox() -> None:
    """And no name is said to be of something else that is not there any more."""
    package = Path(house_table.__file__).parent.parent
    found = house_table.table(package)
    assert found["caches of structures"] == "saving/structures.py KNOWN"
    assert (found["carriers of an attempt"], found["mailboxes that a thread works off"]) == ("Attempt", "1")
    assert found["packb and unpackb, not of what is on disk"] == "0"
    assert set(house_table.OTHER_MEMORIES) < set(house_table.memories(house_table.files_of(package / "elastickpt")))
