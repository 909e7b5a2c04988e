"""What `import elastickpt as ek` offers, in whatever order it is asked for."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import elastickpt as ek
import elastickpt.loading.opened, elastickpt.saving.request  # as a user's own imports, or `ek.open`, do
ek.open
assert "torch" not in sys.modules
for name in ek.__all__:
    assert name in dir(ek)
assert callable(ek.load) and callable(ek.save), (ek.load, ek.save)
from elastickpt.runs.loading import load
assert ek.load is load
assert isinstance(ek.__version__, str) and issubclass(ek.errors.Refused, ek.errors.CheckpointError)
"""


def test_save_and_load_are_functions_whatever_was_imported_before() -> None:
    """The packages of the engines have the same names."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
