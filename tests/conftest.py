"""Test modules that rank processes import by name lie beside their tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "foreign"))
sys.path.insert(0, str(Path(__file__).parent / "ranks"))
sys.path.insert(0, str(Path(__file__).parent / "runs"))
sys.path.insert(0, str(Path(__file__).parent / "save"))
sys.path.insert(0, str(Path(__file__).parent / "elastic"))
