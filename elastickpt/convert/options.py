"""What a conversion is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from elastickpt.errors import Refused, Unsupported
from elastickpt.foreign.formats import WORDS
from elastickpt.foreign.listing import Format
from elastickpt.language.scope import ConstantValue

Weights = Literal["value", "master"]
WRITTEN: tuple[Format, ...] = ("universal", "dcp", "safetensors", "torch", "megatron-legacy")
SHARD_NBYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Options:
    """Of `ckpt-convert convert`; what is None or empty was not said. `rules`, `rules_out` and `names` are files or names."""

    source: str
    out: str
    source_format: str | None = None
    target_format: str | None = None
    step: int | None = None
    rules: str | None = None
    rules_out: str | None = None
    names: tuple[str, ...] = ()
    constants: Mapping[str, ConstantValue] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)  # of a configuration: no program computes with them
    mesh: Mapping[str, int] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    casts: Mapping[str, str] = field(default_factory=dict)
    weights: Weights | None = None
    config: str | None = None
    shard_nbytes: int = SHARD_NBYTES
    workers: int = 1

    def target(self) -> Format:
        """The format to write. Raises Refused for an unknown word, Unsupported for one that this release does not write."""
        if self.target_format is None:
            return "universal"
        if self.target_format not in WORDS:
            raise Refused(f"--to {self.target_format}: expected one of {', '.join(WORDS)}")
        found = next((one for one in WORDS[self.target_format] if one in WRITTEN), None)
        if found is None:
            raise Unsupported(f"--to {self.target_format}: this release writes {', '.join(WRITTEN)}")
        return found
