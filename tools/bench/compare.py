"""From measures to comparable rows: medians, the floor of each setting, ratios to it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from .records import CASES, OWN, RAW, Case, Measure, Setting
from .spread import Spread, ratio_to_floor, spread_of


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant in one setting. `of_floor`, `of_own`: share of the floor's speed, and of that from and into the state's
    own memory. `read_share`: bytes asked for / needed."""

    setting: Setting
    contestant: str
    spread: Spread | None
    of_floor: float | None
    of_own: float | None
    read_share: float | None
    of_same_layout: float | None
    error: str | None

    @property
    def gigabytes_per_s(self) -> float | None:
        return self.setting.nbytes / 1e9 / self.spread.median if self.spread else None

    @property
    def ms_per_tensor(self) -> float | None:
        return self.spread.median * 1e3 / self.setting.tensors if self.spread else None


def rows(measures: Sequence[Measure]) -> tuple[Row, ...]:
    """One row per measure, settings in a fixed order, within a setting fastest first, failures last.

    The floor of a setting is its fastest raw measure; small tensors have none, as one file of the same bytes is no goal.
    A cold or warm load is compared with raw reads of the same cache; `of_same_layout` is a resharding load's time over
    the same contestant's same-layout load at its ranks.
    """
    by_setting: dict[Setting, list[Measure]] = defaultdict(list)
    for measure in measures:
        by_setting[measure.setting].append(measure)
    medians = {
        (measure.setting, measure.contestant): spread_of(measure.seconds).median for measure in measures if measure.seconds
    }
    found: list[Row] = []
    for setting in sorted(by_setting, key=_place_in_table):
        group = [_row(measure, medians) for measure in by_setting[setting]]
        found += sorted(group, key=lambda row: row.spread.median if row.spread else float("inf"))
    return tuple(found)


def floor_s(setting: Setting, medians: Mapping[tuple[Setting, str], float]) -> float | None:
    """The fastest raw median of the setting, for a stall that of a copy in memory; None where no floor was measured."""
    if setting.case == "stall":
        return medians.get((setting, "memcpy"))
    return _fastest(setting, RAW, medians)


def _fastest(setting: Setting, names: Sequence[str], medians: Mapping[tuple[Setting, str], float]) -> float | None:
    return min((medians[setting, name] for name in names if (setting, name) in medians), default=None)


def _row(measure: Measure, medians: Mapping[tuple[Setting, str], float]) -> Row:
    setting = measure.setting
    if not measure.seconds:
        return Row(setting, measure.contestant, None, None, None, None, None, measure.error)
    spread = spread_of(measure.seconds)
    floor = None if setting.case.startswith("small") else floor_s(setting, medians)
    own = _fastest(setting, OWN, medians)
    share = None
    if setting.case in ("load", "reshard") and measure.requested_nbytes:
        share = spread_of(measure.requested_nbytes).median / setting.nbytes
    same = medians.get((replace(setting, case="load", from_ranks=setting.ranks), measure.contestant))
    return Row(
        setting,
        measure.contestant,
        spread,
        of_floor=ratio_to_floor(floor, spread.median) if floor else None,
        of_own=ratio_to_floor(own, spread.median) if own else None,
        read_share=share,
        of_same_layout=spread.median / same if same and setting.case == "reshard" else None,
        error=measure.error,
    )


_ORDER: Mapping[Case, int] = MappingProxyType({case: at for at, case in enumerate(CASES)})


def _place_in_table(setting: Setting) -> tuple[int, str, int, int, int, str]:
    cache = {"cold": "0", "warm": "1", "none": "2"}[setting.cache]
    return (_ORDER[setting.case], setting.place, setting.nbytes, setting.ranks, setting.from_ranks, cache)


def title(setting: Setting) -> str:
    """The setting in words: `load cold, 1.8 GB, 2 ranks, disk`."""
    layout = f"{setting.ranks} rank{'s' if setting.ranks > 1 else ''}"
    if setting.case == "reshard":
        layout = f"{setting.from_ranks} → {setting.ranks} ranks"
    cache = "" if setting.cache == "none" else f" {setting.cache}"
    size = f"{setting.tensors:,} tensors" if setting.case.startswith("small") else f"{setting.nbytes / 1e9:.2g} GB"
    return f"{setting.case}{cache}, {size}, {layout}, {setting.place}"


def gather(samples: Iterable[tuple[Setting, str, float, int, int, str | None]]) -> tuple[Measure, ...]:
    """Measures from single timed calls, in the order of first appearance. A sample with an error has no times."""
    collected: dict[tuple[Setting, str], Measure] = {}
    for setting, name, seconds, requested, device, error in samples:
        before = collected.get((setting, name), Measure(setting, name, ()))
        if error is not None:
            collected[setting, name] = replace(before, error=error)
        else:
            collected[setting, name] = replace(
                before,
                seconds=(*before.seconds, seconds),
                requested_nbytes=(*before.requested_nbytes, requested),
                device_nbytes=(*before.device_nbytes, device),
            )
    return tuple(collected.values())
