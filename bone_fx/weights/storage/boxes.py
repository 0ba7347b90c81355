"""Boxes: the parts of a tensor that are read, computed and written one after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Box = tuple[tuple[int, int], ...]
"""First index and the one behind the last, for each dimension."""


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return tuple((0, size) for size in shape)


def sizes(box: Box) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(stop - start for start, stop in box)


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where a part lies in a tensor that holds a larger part."""
    return tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(box, outer, strict=True)
    )


def bands(box: Box, nbytes: int, itemsize: int, *, grain: int = 1) -> Iterator[Box]:
    """Cut a box along its first dimension into parts of about `nbytes` bytes, in order.

    Args:
        box: What to cut; without dimensions it stays whole.
        nbytes: Bytes of a part; one `grain` of rows may take more.
        itemsize: Bytes of a value.
        grain: Every cut is at a multiple of this index.
    """
    if not box:
        yield box
        return
    (start, stop), *rest = box
    row = math.prod(sizes(tuple(rest))) * itemsize
    step = max(grain, nbytes // max(row, 1) // grain * grain)
    while start < stop:
        end = min(stop, start // grain * grain + step)
        yield ((start, end), *rest)
        start = end
