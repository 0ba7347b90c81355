"""What symbolic shapes say about each other."""

from __future__ import annotations

import onnx_ir as ir


def equal_shapes(left: ir.Shape | None, right: ir.Shape | None) -> bool:
    """Whether both shapes are known and the same."""
    return left is not None and left == right and not left.has_unknown_dim()


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value, if all of it is known as numbers."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(value.shape.numpy())
