"""The writer process: `python -m elastickpt.writer --fd N`, N being its end of the connection. Started by `Child.spawn`."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

os.putenv("OPENBLAS_NUM_THREADS", "1")  # numpy starts a thread for each core otherwise, and nothing here multiplies
if not __package__:  # started by its path: the trainer's own copy of this package, and no other one that is installed
    _root = str(Path(__file__).resolve().parents[2])
    sys.path.insert(0, _root)
    import_module("elastickpt.writer")
    sys.path.remove(_root)
    sys.path.append(_root)

from elastickpt.writer.process import main

main(int(sys.argv[sys.argv.index("--fd") + 1]))
