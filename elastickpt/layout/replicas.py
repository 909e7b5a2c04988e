"""Which part of a box each of its replicas writes: a function of box and replica number, so that nobody has to ask."""

from __future__ import annotations

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.box import Box
from elastickpt.format.limits import MIB
from elastickpt.layout.partition import balanced, flat_boxes

MIN_SPLIT_NBYTES = MIB  # below this, one more file to open and sync costs more than the bytes that another rank saves


def share_of(box: Box, *, itemsize: int, index: int, count: int, salt: int) -> tuple[Box, ...]:
    """What replica `index` of `count` writes of `box`; over all indices the shares cover it exactly once.

    A box under 1 MiB goes whole to replica `salt % count`. A larger one is split by rows of the first axis with at
    least `count` of them, or by flat ranges where there is none, as evenly as whole rows or elements allow; the
    remainder goes to the replicas from `salt % count` on. `salt` is any number that all replicas know, one an array,
    so that the small arrays and the remainders spread over the replicas. Raises LayoutUnsupported unless `0 <= index
    < count`.
    """
    if not 0 <= index < count:
        raise LayoutUnsupported(f"replica {index} of {count} of box {box}")
    turn = (index - salt) % count
    if count == 1 or box.count * itemsize < MIN_SPLIT_NBYTES:
        return (box,) if turn == 0 and box.count else ()
    for axis, extent in enumerate(box.shape):
        if extent >= count:
            low = box.start[axis]
            first, last = balanced(extent, count)[turn]
            start = (*box.start[:axis], low + first, *box.start[axis + 1 :])
            return (Box(start, (*box.stop[:axis], low + last, *box.stop[axis + 1 :])),)
    return flat_boxes(box, *balanced(box.count, count)[turn])
