"""Arrays of a checkpoint that are one tensor in this process: only one can be taken, so the others must have its contents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from elastickpt.format.arrays import ArrayId
from elastickpt.loading.fetch import Verify, carry_out
from elastickpt.loading.opened import Opened
from elastickpt.loading.plan import Elements, Wanted, plan_fetch, require_files
from elastickpt.training.held import HeldArray


def differing_ties(
    opened: Opened, ties: Sequence[tuple[HeldArray, ArrayId]], hosts: Sequence[Elements], *, verify: Verify
) -> Iterator[str]:
    """What differs, in words, of this rank's box of each pair. Blocking: reads both; `hosts[i]` has the words of a target."""
    for (held, other), host in zip(ties, hosts, strict=True):
        read = held.spec.id
        records = [opened.records[read], opened.records[other]]
        if (records[0].spec.shape, records[0].spec.dtype) == (records[1].spec.shape, records[1].spec.dtype):
            boxes = [np.empty(host.shape, dtype=host.dtype) for _ in records]
            plan = plan_fetch(opened, [Wanted(record, held.box, box) for record, box in zip(records, boxes, strict=True)])
            require_files(opened, plan)
            carry_out(opened, plan, verify=verify)
            if boxes[0].tobytes() == boxes[1].tobytes():
                continue
        yield (
            f"{other}: value: expected the contents of {read}, as the two are one tensor in this process, "
            f"found others (in the checkpoint)"
        )
