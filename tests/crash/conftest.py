"""Modules that the tests of this folder share, and that rank processes import by name, lie beside them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
