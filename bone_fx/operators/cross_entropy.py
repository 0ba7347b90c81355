"""Cross entropy of many classes that keeps the logits and one number a row.

PyTorch's keeps the log-softmax beside the logits and forms two gradients of their size; a
vocabulary of 49152 makes each of them larger than a layer's activations. Here there is one.

Shapes: T rows, V classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register

CHUNK = 1 << 19
"""Numbers computed at a time: few enough to stay in a cache."""


class CrossEntropy(torch.autograd.Function):
    """Sum over the rows of `logsumexp(x) - x[target]`; second derivatives are refused."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, target_T: Tensor, ignore_index: int) -> Tensor:
        """A sum without dimensions, in the dtype of the logits."""
        index_T1, counted_T = rows_that_count(target_T, ignore_index)
        total_T = logsumexp(logits_TV)
        ctx.save_for_backward(logits_TV, total_T, index_T1, counted_T)
        return sum_of_losses(total_T, logits_TV.gather(1, index_T1).squeeze(1), counted_T)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """`(softmax(x) - onehot(target)) · dy`."""
        logits_TV, total_T, index_T1, counted_T = ctx.saved_tensors
        dx_TV = torch.empty_like(logits_TV)
        return logit_gradient(dx_TV, logits_TV, total_T, index_T1, counted_T * dy), None, None


def rows_that_count(target_T: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The class of each row, `[T, 1]`, 0 for those that do not count, and which count, `[T]`."""
    counted_T = target_T != ignore_index
    return torch.where(counted_T, target_T, 0).unsqueeze(1), counted_T


def sum_of_losses(total_T: Tensor, picked_T: Tensor, counted_T: Tensor) -> Tensor:
    """The sum over rows that count of logsumexp minus the logit of the row's class."""
    return (total_T - picked_T).masked_fill_(~counted_T, 0).sum()


def logsumexp(logits_TV: Tensor) -> Tensor:
    """`[T]`, with one buffer for all parts."""
    size = _rows_at_a_time(logits_TV)
    total_T = logits_TV.new_empty(logits_TV.shape[0])
    buffer = torch.empty_like(logits_TV[:size])
    for rows, out in zip(torch.split(logits_TV, size), torch.split(total_T, size), strict=True):
        largest = rows.amax(-1).nan_to_num_(posinf=0.0, neginf=0.0, nan=torch.nan)
        exponents = torch.sub(rows, largest.unsqueeze(1), out=buffer[: len(rows)])
        torch.sum(exponents.exp_(), -1, out=out)
        out.log_().add_(largest)
    return total_T


def logit_gradient(
    out_TV: Tensor, logits_TV: Tensor, total_T: Tensor, index_T1: Tensor, scale_T: Tensor
) -> Tensor:
    """`(softmax(x) - onehot(index)) · scale`, written to `out_TV`, which may be the logits.

    Args:
        out_TV: Where the result goes.
        logits_TV: x.
        total_T: Their logsumexp.
        index_T1: The class of each row, int64.
        scale_T: The factor of each row.
    """
    scale_T1 = scale_T.unsqueeze(1)
    size = _rows_at_a_time(logits_TV)
    tensors = (out_TV, logits_TV, total_T.unsqueeze(1), scale_T1)
    for out, logits, total, scale in zip(*(torch.split(t, size) for t in tensors), strict=True):
        torch.sub(logits, total, out=out).exp_().mul_(scale)
    return out_TV.scatter_add_(1, index_T1, -scale_T1)


def cross_entropy_sum(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The sum of the cross entropies of rows whose target is not `ignore_index`.

    Args:
        logits: `[T, V]`.
        target: `[T]`, classes, int64.
        ignore_index: The target of rows that do not count.

    Returns:
        A tensor without dimensions.
    """
    y: Tensor = CrossEntropy.apply(logits, target, ignore_index)  # type: ignore[no-untyped-call]
    return y


CROSS_ENTROPY_SUM = register(
    "cross_entropy_sum(Tensor logits, Tensor target, int ignore_index) -> Tensor",
    cross_entropy_sum,
)


def _rows_at_a_time(logits_TV: Tensor) -> int:
    return max(1, CHUNK // max(1, logits_TV.shape[1]))
