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
    def forward(ctx: Any, x: Tensor, _: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        """`[..., I]` in `x`'s dtype; x is given twice, for the two terms of its gradient."""
        squares = x * x
        rate = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rate, gain)
        normed = torch.mul(x, rate, out=squares)
        return normed if gain is None else normed.mul_(gain)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """`dx = d·s - x·s³·mean(d·x)` with `s = 1 / sqrt(mean(x²) + eps)` and `d = gain·dy`.

        Rounded as autograd rounds it for the chain of operators.
        """
        x, rate, gain = ctx.saved_tensors
        dx = dalong = dgain = None
        if ctx.needs_input_grad[2]:
            dgain = (x * rate).mul_(dy).reshape(-1, x.shape[-1]).sum(0)
        if ctx.needs_input_grad[0]:
            dx = dy.clone() if gain is None else dy * gain
            along = (dx * x).sum(-1, keepdim=True)
            along.mul_(-0.5).mul_(rate.pow(3)).div_(x.shape[-1])
            dx.mul_(rate)
            dalong = x * along.mul_(2)
        return dx, dalong, dgain, None


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
    y: Tensor = RmsNorm.apply(x, x, gain, eps)  # type: ignore[no-untyped-call]
    return y


RMS_NORM = register("rms_norm(Tensor x, Tensor? gain, float eps) -> Tensor", rms_norm)
"""The operator as it stands in graphs: `torch.ops.bone_fx.rms_norm.default`."""
