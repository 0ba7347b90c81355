"""Names of constants that hold several weights of the model, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

JOINT = "+"
WHOLE = "++"


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
