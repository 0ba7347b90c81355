"""Logits that nobody reads but the loss, which takes them a few rows at a time.

Logits of 49152 classes for 512 tokens take 100 MB, and their gradient as much again. What a
training step wants of them is the loss and the gradient of what they were made from, and with the
labels at hand forward computes both from the same rows; backward has only to scale (the idea is
that of Liger-Kernel's fused linear cross entropy). The output still has its logits, and they their
gradient, for those who read them.

Shapes: T rows, V classes, I in_features of the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bone_fx.errors import UsageError
from bone_fx.operators.cross_entropy import (
    logit_gradient,
    logsumexp,
    rows_that_count,
    sum_of_losses,
)
from bone_fx.operators.deferred import Deferred, DeferredTensor
from bone_fx.operators.first_order import first_order
from bone_fx.operators.product import times

AT_A_TIME = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Numbers of the logits that exist at a time, by device; logits that are no more are not deferred.

Products of fewer rows are slower. On a CPU of two cores those of 64 rows of SmolLM2's head take 1.2
times as long as one of 512, those of 128 rows as long. For a GPU it is an estimate: a thousand rows
of 128256 classes keep it busy.
"""


class Logits(Deferred):
    """`x Wᵀ + b` of a frozen head.

    Args:
        x_TI: `[T, I]`.
        weight_VI: `[V, I]`.
        bias: `[V]` or None.
    """

    def __init__(self, x_TI: Tensor, weight_VI: Tensor, bias: Tensor | None) -> None:
        super().__init__((len(x_TI), len(weight_VI)), x_TI.dtype, x_TI.device)
        self.x_TI, self.weight_VI, self.bias = x_TI, weight_VI, bias
        self._version = weight_VI._version

    def _form(self) -> Tensor:
        is_freed = not self.weight_VI.untyped_storage().size()
        if is_freed or self.weight_VI._version != self._version:
            raise UsageError(
                "the logits of a training step are read after their head's weight was changed",
                next_step="read them before; or call the model without labels",
            )
        return times(self.x_TI, self.weight_VI, self.bias)


class LogitGradient(Deferred):
    """`(softmax(logits) - onehot(index)) · scale`, and its product with the head's weight.

    Args:
        logits: Of a head.
        dx_TI: The product.
        total_T: The logits' logsumexp.
        index_T1: The class of each row.
        scale_T: The factor of each row.
    """

    def __init__(
        self, logits: Logits, dx_TI: Tensor, total_T: Tensor, index_T1: Tensor, scale_T: Tensor
    ) -> None:
        super().__init__(logits.shape, logits.dtype, logits.device)
        self.dx_TI = dx_TI
        self._logits = logits
        self._rows = total_T, index_T1, scale_T

    def _form(self) -> Tensor:
        # Formed for this alone: those that someone read may have been changed in place.
        logits_TV = self._logits._form().to(self._logits.dtype)
        return logit_gradient(logits_TV, logits_TV, *self._rows)


class DeferredCrossEntropy(torch.autograd.Function):
    """Sum over the rows of `logsumexp(x) - x[target]`; second derivatives are refused."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: DeferredTensor, target_T: Tensor, ignore_index: int, anchor: Tensor
    ) -> Tensor:
        """A sum without dimensions, in the dtype of the logits."""
        logits: Any = logits_TV.of
        ctx.logits, ctx.tensors = logits, logits.tensors()
        index_T1, counted_T = rows_that_count(target_T, ignore_index)
        total_T = logits.x_TI.new_empty(logits.shape[0], dtype=logits.dtype)
        picked_T, dx_TI = torch.empty_like(total_T), torch.empty_like(logits.x_TI)
        tensors = (logits.x_TI, index_T1, counted_T, total_T, picked_T, dx_TI)
        pieces = max(1, -(-logits.shape[0] * logits.shape[1] // AT_A_TIME[logits.device.type]))
        for rows in zip(*(torch.tensor_split(t, pieces) for t in tensors), strict=True):
            _loss_and_gradient(logits, *rows)
        ctx.save_for_backward(dx_TI, total_T, index_T1, counted_T)
        return sum_of_losses(total_T, picked_T, counted_T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """A tensor that is not formed, where nobody looks at it."""
        if torch.is_grad_enabled() or _is_looked_at(ctx):
            return _whole_gradient(ctx, dy)
        return _gradient(ctx, dy).tensor(), None, None, None


def _loss_and_gradient(
    logits: Logits,
    x_TI: Tensor,
    index_T1: Tensor,
    counted_T: Tensor,
    total_T: Tensor,
    picked_T: Tensor,
    dx_TI: Tensor,
) -> None:
    """Fill in some rows' logsumexp, logit of the class, and gradient of the sum of losses by x."""
    rows_TV = times(x_TI, logits.weight_VI, logits.bias).to(logits.dtype)
    total_T.copy_(logsumexp(rows_TV))
    picked_T.copy_(rows_TV.gather(1, index_T1).squeeze(1))
    logit_gradient(rows_TV, rows_TV, total_T, index_T1, counted_T.to(rows_TV.dtype))
    dx_TI.copy_(times(rows_TV.to(x_TI.dtype), logits.weight_VI.t()))


def _gradient(ctx: Any, dy: Tensor) -> LogitGradient:
    dx_TI, total_T, index_T1, counted_T = ctx.saved_tensors
    return LogitGradient(ctx.logits, dx_TI * dy.to(dx_TI.dtype), total_T, index_T1, counted_T * dy)


@first_order
def _whole_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, dy).whole(), None, None, None


def _is_looked_at(ctx: Any) -> bool:
    """Whether someone may see the gradient: by `retain_grad`, a hook, or from `autograd.grad`.

    A call that names what it wants gradients of does not reach the anchor.
    """
    if any(logits.retains_grad or logits._backward_hooks for logits in ctx.tensors):
        return True
    anchor = ctx.next_functions[-1][0]
    return anchor is None or not torch._C._will_engine_execute_node(anchor)


def deferred_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """`cross_entropy_sum` of `Logits` that are not formed, `[T, V]`."""
    anchor = torch.zeros((), requires_grad=True).clone()
    apply: Any = DeferredCrossEntropy.apply
    y: Tensor = apply(logits, target, ignore_index, anchor)
    return y
