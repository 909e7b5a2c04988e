"""`python -m elastickpt` is `ckpt-convert`."""

from __future__ import annotations

import sys

from elastickpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
