"""Names of constants that hold several weights of the model, or one with its rows in another order.

One after the other: `a.q+k.weight`. Rows of four groups of 16, 16 and 16 put part by part:
`a.qkv.weight.by_part_4_16_16_16`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

JOINT = "+"
WHOLE = "++"
BY_PART = re.compile(r"\.by_part_(\d+)((?:_\d+)+)$")


def packed_name(names: Sequence[str]) -> str:
    """`a.q.weight`, `a.k.weight` -> `a.q+k.weight`; whole names joined where more differs."""
    columns = list(zip(*(name.split(".") for name in names), strict=False))
    same_length = len({name.count(".") for name in names}) == 1
    differing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if not same_length or len(differing) != 1:
        return WHOLE.join(names)
    return ".".join(
        JOINT.join(column) if i in differing else column[0] for i, column in enumerate(columns)
    )


def parts_of(name: str) -> list[str]:
    """The names that `packed_name` was given; a name of one weight is its own only part."""
    name = BY_PART.sub("", name)
    if WHOLE in name:
        return name.split(WHOLE)
    components = name.split(".")
    joined = [i for i, component in enumerate(components) if JOINT in component]
    if not joined:
        return [name]
    place = joined[0]
    return [
        ".".join([*components[:place], part, *components[place + 1 :]])
        for part in components[place].split(JOINT)
    ]


def by_part_name(name: str, groups: int, widths: Sequence[int]) -> str:
    """The name of a weight whose groups of rows were put part by part."""
    return f"{name}.by_part_{groups}" + "".join(f"_{width}" for width in widths)


def groups_of(name: str) -> tuple[int, tuple[int, ...]] | None:
    """Groups and widths that `by_part_name` was given; None for other names."""
    match = BY_PART.search(name)
    if match is None:
        return None
    return int(match[1]), tuple(int(width) for width in match[2].split("_")[1:])
