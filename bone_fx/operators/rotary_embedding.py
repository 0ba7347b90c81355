"""`bone_fx::rotary`: rotary position embedding in halves, in place of a chain of seven operators.

arXiv 2104.09864, with the pairs `(x[i], x[i + D/2])` of GPT-NeoX and Llama (`rotate_half`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register


class Rotary(torch.autograd.Function):
    """`x·cos + rotate_half(x)·sin`; second derivatives are refused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The shape and dtype of `x`."""
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, rotated back."""
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin, back=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Each pair rotated by the angle, or back by it: then the halves change places."""
    y = x * cos
    (x1, x2), (y1, y2), (sin1, sin2) = (t.chunk(2, -1) for t in (x, y, sin))
    if back:
        x1, x2, y1, y2 = x2, x1, y2, y1
    # Not addcmul, which rounds once where the chain of operators rounds twice.
    term = x2 * sin1
    y1.sub_(term)
    y2.add_(torch.mul(x1, sin2, out=term))
    return y


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x·cos + rotate_half(x)·sin` with `rotate_half(x) = (-x2, x1)` of the halves of x.

    Args:
        x: `[..., D]`.
        cos: Broadcast to `x`.
        sin: The same.

    Returns:
        The shape of `x`.
    """
    plain = x.dtype == cos.dtype == sin.dtype and not (cos.requires_grad or sin.requires_grad)
    if not plain:
        x1, x2 = x.chunk(2, -1)
        return x * cos + torch.cat([-x2, x1], -1) * sin
    y: Tensor = Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


ROTARY = register("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", rotary)
"""The operator as it stands in graphs: `torch.ops.bone_fx.rotary.default`."""
