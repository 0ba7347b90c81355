"""Cross entropy of many classes that keeps the logits only.

PyTorch's keeps the log-softmax beside the logits and forms two gradients of their size; a
vocabulary of 49152 makes each of them larger than a layer's activations. Here there is one, of the
same bits: the kernels are PyTorch's, over a few rows at a time.

Shapes: T rows, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register

aten = torch.ops.aten

CHUNK = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Numbers computed at a time, by device: few enough to stay in a CPU's cache, enough to keep a GPU
busy."""


class CrossEntropy(torch.autograd.Function):
    """Sum or mean over the rows of `-log_softmax(x)[target]`; second derivatives are refused."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, target_T: Tensor, ignore_index: int, reduction: str
    ) -> Tensor:
        """A number without dimensions, in the dtype of the logits."""
        index_T1, counted_T = rows_that_count(target_T, ignore_index)
        picked_T1 = logits_TV.new_empty(index_T1.shape)
        for logits, index, picked in _chunks(logits_TV, index_T1, picked_T1):
            torch.gather(torch.log_softmax(logits, -1), 1, index, out=picked)
        ctx.reduction = reduction
        ctx.save_for_backward(logits_TV, index_T1, counted_T)
        return reduced(picked_T1, counted_T, reduction)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """`(softmax(x) - onehot(target)) · dy`, over the number of rows for a mean."""
        logits_TV, index_T1, counted_T = ctx.saved_tensors
        dx_TV = torch.empty_like(logits_TV)
        for logits, out in _chunks(logits_TV, dx_TV):
            aten._log_softmax.out(logits, -1, False, out=out)
        scale_T = share(dy, counted_T, ctx.reduction)
        return logit_gradient_(dx_TV, index_T1, scale_T), None, None, None


def rows_that_count(target_T: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The class of each row, `[T, 1]`, 0 for those that do not count, and which count, `[T]`."""
    counted_T = target_T != ignore_index
    return torch.where(counted_T, target_T, 0).unsqueeze(1), counted_T


def reduced(picked_T1: Tensor, counted_T: Tensor, reduction: str) -> Tensor:
    """The loss, from each row's logarithm of the probability of its class."""
    target_T = torch.where(counted_T, 0, -1)
    return functional.nll_loss(picked_T1, target_T, ignore_index=-1, reduction=reduction)


def share(dy: Tensor, counted_T: Tensor, reduction: str) -> Tensor:
    """The gradient of each row's own loss, `[T]`, from that of the loss."""
    counted_T = counted_T.to(dy.dtype)
    return counted_T * (dy if reduction == "sum" else dy / counted_T.sum().clamp_(min=1))


def log_softmax_(logits_TV: Tensor) -> Tensor:
    """The logarithms of the probabilities, in place of the logits."""
    log_TV: Tensor = aten._log_softmax.out(logits_TV, -1, False, out=logits_TV)
    return log_TV


def logit_gradient_(log_TV: Tensor, index_T1: Tensor, scale_T: Tensor) -> Tensor:
    """`(softmax(x) - onehot(index)) · scale`, in place of the log-softmax.

    Args:
        log_TV: `log_softmax(x)`.
        index_T1: The class of each row, int64.
        scale_T: The factor of each row.
    """
    picked_TV = torch.zeros_like(log_TV[: _rows_at_a_time(log_TV)])
    for rows, index, scale in _chunks(log_TV, index_T1, scale_T.unsqueeze(1)):
        picked = picked_TV[: len(rows)].scatter_(1, index, -scale)
        aten._log_softmax_backward_data.out(picked, rows, -1, rows.dtype, out=rows)
        picked.scatter_(1, index, 0.0)
    return log_TV


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The cross entropy of rows whose target is not `ignore_index`.

    Args:
        logits: `[T, V]`.
        target: `[T]`, classes, int64.
        ignore_index: The target of rows that do not count.
        reduction: `"sum"` or `"mean"`.

    Returns:
        A tensor without dimensions.
    """
    y: Tensor = CrossEntropy.apply(logits, target, ignore_index, reduction)  # type: ignore[no-untyped-call]
    return y


CROSS_ENTROPY = register(
    "cross_entropy(Tensor logits, Tensor target, int ignore_index, str reduction) -> Tensor",
    cross_entropy,
)


def _chunks(rows_TV: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of several tensors at a time."""
    size = _rows_at_a_time(rows_TV)
    return zip(*(torch.split(t, size) for t in (rows_TV, *tensors)), strict=True)


def _rows_at_a_time(logits_TV: Tensor) -> int:
    numbers = CHUNK.get(logits_TV.device.type, CHUNK["cuda"])
    return max(1, numbers // max(1, logits_TV.shape[1]))
