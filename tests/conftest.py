"""Test modules that rank processes import by name lie beside their tests."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent / "convert"))
sys.path.insert(0, str(Path(__file__).parent / "harness"))
sys.path.insert(0, str(Path(__file__).parent / "foreign"))
sys.path.insert(0, str(Path(__file__).parent / "ranks"))
sys.path.insert(0, str(Path(__file__).parent / "runs"))
sys.path.insert(0, str(Path(__file__).parent / "save"))
sys.path.insert(0, str(Path(__file__).parent / "elastic"))

# What a property states holds however long a busy machine takes over an example.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
