"""`bone_fx::rms_norm`: x over its root mean square times a gain, keeping x and one number a token.

arXiv 1910.07467, equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register


class RmsNorm(torch.autograd.Function):
    """`gain · x / sqrt(mean(x²) + eps)` over the last dimension; second derivatives are refused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        """`[..., I]` in `x`'s dtype."""
        squares = x * x
        rate = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rate, gain)
        normed = torch.mul(x, rate, out=squares)
        return normed if gain is None else normed.mul_(gain)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """`dx = s·(d - x·s²·mean(d·x))` with `s = 1 / sqrt(mean(x²) + eps)` and `d = gain·dy`."""
        x, rate, gain = ctx.saved_tensors
        dx = dgain = None
        if ctx.needs_input_grad[1]:
            dgain = (x * rate).mul_(dy).reshape(-1, x.shape[-1]).sum(0)
        if ctx.needs_input_grad[0]:
            d = dy if gain is None else dy * gain
            along = (d * x).mean(-1, keepdim=True).mul_(rate * rate)
            dx = torch.addcmul(d, x, along, value=-1).mul_(rate)
        return dx, dgain, None


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """`gain · x / sqrt(mean(x²) + eps)` over the last dimension.

    Args:
        x: `[..., I]`; half precision is computed in float32 under autocast, as `pow` is.
        gain: `[I]`, or None for one.
        eps: Added to the mean.

    Returns:
        `[..., I]`.
    """
    if x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
        x = x.float()
    if gain is not None and gain.dtype != x.dtype:
        return rms_norm(x, None, eps) * gain
    y: Tensor = RmsNorm.apply(x, gain, eps)  # type: ignore[no-untyped-call]
    return y


RMS_NORM = register("rms_norm(Tensor x, Tensor? gain, float eps) -> Tensor", rms_norm)
"""The operator as it stands in graphs: `torch.ops.bone_fx.rms_norm.default`."""
