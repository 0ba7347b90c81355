"""What symbolic shapes say about each other."""

from __future__ import annotations

import onnx_ir as ir

Dim = int | str


def known_dims(shape: ir.Shape | None) -> list[Dim] | None:
    """Every dimension as a number or a symbol; None if one of them is unknown."""
    if shape is None:
        return None
    dims = [dim if isinstance(dim, int) else dim.value for dim in shape]
    return None if None in dims else [dim for dim in dims if dim is not None]


def equal_shapes(left: ir.Shape | None, right: ir.Shape | None) -> bool:
    """Whether both shapes are known and the same."""
    dims = known_dims(left)
    return dims is not None and dims == known_dims(right)


def reshape_target(source: ir.Shape | None, result: ir.Shape | None) -> list[int] | None:
    """The constant target of a `Reshape` (allowzero=0) from `source` to `result`, if any.

    Numbers stand for themselves, 0 copies the dimension in the same place, and at most one -1 is
    what is left over.
    """
    old, new = known_dims(source), known_dims(result)
    if old is None or new is None:
        return None
    target: list[int] = []
    for place, dim in enumerate(new):
        if isinstance(dim, int):
            target.append(dim)
        elif place < len(old) and old[place] == dim:
            target.append(0)
        else:
            target.append(-1)
    if target.count(-1) > 1 or any(dim == 0 for dim in new):
        return None
    return target
