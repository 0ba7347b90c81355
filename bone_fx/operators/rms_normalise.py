"""`bone_fx::rms_normalise`: x over its root mean square, keeping x and one number a token.

arXiv 1910.07467, equation 4, without the gain, which stays the graph's own product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register


class RmsNormalise(torch.autograd.Function):
    """`x / sqrt(mean(x²) + eps)` over the last dimension; second derivatives are refused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        """`[..., I]` in `x`'s dtype."""
        rate = x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rate)
        normed: Tensor = x * rate
        return normed

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        """`dx = dy·s - x·s³·mean(dy·x)` with `s = 1 / sqrt(mean(x²) + eps)`."""
        x, rate = ctx.saved_tensors
        along = (dy * x).sum(-1, keepdim=True)
        dx = dy * rate
        return dx.addcmul_(x, along.mul_(rate.pow(3)).div_(x.shape[-1]), value=-1.0), None


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps)` over the last dimension.

    Args:
        x: `[..., I]`; half precision is computed in float32 under autocast, as `pow` is.
        eps: Added to the mean.

    Returns:
        `[..., I]`.
    """
    if x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
        x = x.float()
    y: Tensor = RmsNormalise.apply(x, eps)  # type: ignore[no-untyped-call]
    return y


RMS_NORMALISE = register("rms_normalise(Tensor x, float eps) -> Tensor", rms_normalise)
"""The operator as it stands in graphs: `torch.ops.bone_fx.rms_normalise.default`."""
