"""Cross entropy of the logits `x Wᵀ + b` of a frozen head, formed a few rows at a time.

Logits of 49152 classes for 512 tokens take 100 MB, and their gradient as much again. With the
labels at hand, forward computes the loss and the gradient of x from the same rows, and backward
only scales it (the idea is that of Liger-Kernel's fused linear cross entropy).

Shapes: T rows, V classes, I in_features of the head, N rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.operators.first_order import first_order

CHUNK = {"cpu": 3 << 22, "cuda": 1 << 27}
"""Logits formed at a time, in numbers, by device: 256 rows of SmolLM2's 49152 classes on a CPU, a
thousand of 128256 on a GPU (an estimate). Products of fewer rows are slower."""

KERNEL_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Numbers of a gradient that PyTorch's kernel computes at a time: few enough to stay in a
CPU's cache, enough to keep a GPU busy."""


class LinearCrossEntropy(torch.autograd.Function):
    """The sum over counted rows of `-log_softmax(x Wᵀ + b)[target]`, over a divisor."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_VI: Tensor,
        bias: Tensor | None,
        target_T1: Tensor,
        counted_T1: Tensor,
        divisor: Tensor,
    ) -> Tensor:
        """A number without dimensions, float32; the gradient of x is kept."""
        dx_TI = torch.empty_like(x_TI)
        log_T1 = torch.empty_like(target_T1, dtype=torch.float32)
        scale_T1 = torch.where(counted_T1, 1 / divisor, 0)
        size = chunk_rows(weight_VI)
        chunks = (torch.split(t, size) for t in (x_TI, target_T1, scale_T1, dx_TI, log_T1))
        for x_NI, target_N1, scale_N1, dx_NI, log_N1 in zip(*chunks, strict=True):
            log_NV = functional.linear(x_NI, weight_VI, bias).float()
            torch.log_softmax(log_NV, -1, out=log_NV)
            torch.gather(log_NV, 1, target_N1, out=log_N1)
            _logit_gradient_(log_NV, target_N1, scale_N1)
            torch.mm(log_NV.to(x_NI.dtype), weight_VI, out=dx_NI)
        ctx.save_for_backward(dx_TI)
        ignored_T = torch.where(counted_T1, 0, -1).squeeze(1)
        summed = functional.nll_loss(log_T1, ignored_T, ignore_index=-1, reduction="sum")
        return summed / divisor

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x, scaled."""
        (dx_TI,) = ctx.saved_tensors
        return dx_TI * dy.to(dx_TI.dtype), *(None,) * 5


def _logit_gradient_(log_NV: Tensor, target_N1: Tensor, scale_N1: Tensor) -> None:
    """`(softmax(x) - onehot(target)) · scale` in place of `log_softmax(x)`, by PyTorch's kernel."""
    size = max(1, KERNEL_CHUNK.get(log_NV.device.type, KERNEL_CHUNK["cuda"]) // log_NV.shape[1])
    picked_NV = torch.zeros_like(log_NV[:size])
    rows = (torch.split(t, size) for t in (log_NV, target_N1, scale_N1))
    for log, target, scale in zip(*rows, strict=True):
        picked = picked_NV[: len(log)].scatter_(1, target, -scale)
        torch.ops.aten._log_softmax_backward_data.out(picked, log, -1, log.dtype, out=log)
        picked.scatter_(1, target, 0.0)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    divisor: Tensor | float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The cross entropy of the logits `x Wᵀ + b`; second derivatives are refused.

    Args:
        x: `[..., I]`, float32 or bfloat16.
        weight: `[V, I]`, frozen, in the dtype of x.
        bias: `[V]` or None.
        target: The class of each row, int64, as many as rows of x.
        divisor: What the sum over the rows is divided by; None for the number that count.
        ignore_index: The target of rows that do not count.

    Returns:
        A tensor without dimensions, float32.

    Raises:
        ValueError: There are not as many targets as rows.
    """
    x_TI, target_T1 = x.reshape(-1, x.shape[-1]), target.reshape(-1, 1).to(x.device)
    if len(x_TI) != len(target_T1):
        raise ValueError(f"{len(target_T1)} labels for {len(x_TI)} rows of logits")
    counted_T1 = target_T1 != ignore_index
    target_T1 = torch.where(counted_T1, target_T1, 0)
    number = counted_T1.sum() if divisor is None else torch.as_tensor(divisor, device=x.device)
    apply: Any = LinearCrossEntropy.apply
    loss: Tensor = apply(x_TI, weight, bias, target_T1, counted_T1, number.float())
    return loss


def chunk_rows(weight_VI: Tensor) -> int:
    """Rows of logits that are formed at a time."""
    return max(1, CHUNK.get(weight_VI.device.type, CHUNK["cuda"]) // len(weight_VI))
