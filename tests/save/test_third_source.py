"""A source that is neither live tensors nor an arena makes checkpoints by one file of its own, where there is no torch.

The file is `numpy_source.py` beside this: arrays, their grids and the boxes that each writer holds are enough.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

import elastickpt as ek
from elastickpt.format.arrays import ArrayId

HERE = Path(__file__).parent


def test_arrays_of_numpy_are_saved_by_two_writers_without_torch_and_without_a_process_group(tmp_path: Path) -> None:
    """All of it in a process in which torch cannot be imported."""
    code = f"""
import sys
sys.modules["torch"] = None
sys.path.insert(0, {str(HERE)!r})
import numpy as np
import numpy_source
arrays = {{"w": np.arange(60, dtype=np.float32).reshape(10, 6), "b": np.arange(7, dtype=np.int64)}}
more = {{"values": {{"/note": "made of numpy"}}, "layout_text": "axes: none"}}
numpy_source.save(arrays, {str(tmp_path / "c")!r}, step=3, writers=2, **more)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stderr
    found = ek.open(tmp_path / "c")
    assert found.verify().problems == ()
    assert (found.step, dict(found.values)) == (3, {"/note": "made of numpy"})
    assert found.manifest.layout_text == "axes: none"
    assert np.array_equal(found.read(ArrayId("extra", "arrays", "w", "")), np.arange(60, dtype=np.float32).reshape(10, 6))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
