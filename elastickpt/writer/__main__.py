"""The writer process: `python -m elastickpt.writer --fd N`, N being its end of the connection. Started by `Child.spawn`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.putenv("OPENBLAS_NUM_THREADS", "1")  # numpy starts a thread for each core otherwise, and nothing here multiplies
if not __package__:  # started by its path, wherever the trainer found this package
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from elastickpt.writer.process import main

main(int(sys.argv[sys.argv.index("--fd") + 1]))
