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
from torch.nn import functional

from bone_fx.errors import UsageError
from bone_fx.operators.first_order import first_order
from bone_fx.operators.loss.cross_entropy import (
    log_softmax_,
    logit_gradient_,
    reduced,
    rows_that_count,
    share,
)
from bone_fx.operators.loss.deferred import Deferred, DeferredTensor
from bone_fx.operators.workspace import workspace

CLASSES = 1024
"""Columns of the logits that a product forms at a time on a CPU, where they stay in the cache: 170
GFLOP/s where the product of all columns has 145."""


class Logits(Deferred):
    """`x Wᵀ + b` of a frozen head.

    Args:
        x_TI: `[T, I]`.
        weight_VI: `[V, I]`.
        bias: `[V]` or None.
        at_a_time: Numbers of the logits that the loss may form at a time.
    """

    def __init__(
        self, x_TI: Tensor, weight_VI: Tensor, bias: Tensor | None, at_a_time: int
    ) -> None:
        super().__init__((len(x_TI), len(weight_VI)), x_TI.dtype, x_TI.device)
        self.x_TI, self.weight_VI, self.bias = x_TI, weight_VI, bias
        self.at_a_time = at_a_time
        self._version = weight_VI._version

    def _form(self) -> Tensor:
        is_freed = not self.weight_VI.untyped_storage().size()
        if is_freed or self.weight_VI._version != self._version:
            raise UsageError(
                "the logits of a training step are read after their head's weight was changed",
                next_step="read them before; or call the model without labels",
            )
        return functional.linear(self.x_TI, self.weight_VI, self.bias)


class LogitGradient(Deferred):
    """`(softmax(logits) - onehot(index)) · scale`, and its product with the head's weight.

    Args:
        logits: Of a head.
        dx_TI: The product.
        index_T1: The class of each row.
        scale_T: The factor of each row.
    """

    def __init__(self, logits: Logits, dx_TI: Tensor, index_T1: Tensor, scale_T: Tensor) -> None:
        super().__init__(logits.shape, logits.dtype, logits.device)
        self.dx_TI = dx_TI
        self._logits = logits
        self._rows = index_T1, scale_T

    def _form(self) -> Tensor:
        # Formed for this alone: those that someone read may have been changed in place.
        logits_TV = self._logits._form().to(self._logits.dtype)
        return logit_gradient_(log_softmax_(logits_TV), *self._rows)


class DeferredCrossEntropy(torch.autograd.Function):
    """Sum or mean over the rows of `-log_softmax(x)[target]`; second derivatives are refused."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: DeferredTensor,
        target_T: Tensor,
        ignore_index: int,
        reduction: str,
        anchor: Tensor,
    ) -> Tensor:
        """A number without dimensions, in the dtype of the logits."""
        logits: Any = logits_TV.of
        ctx.logits, ctx.tensors = logits, logits.tensors()
        index_T1, counted_T = rows_that_count(target_T, ignore_index)
        scale_T = share(logits.x_TI.new_ones((), dtype=logits.dtype), counted_T, reduction)
        picked_T1 = scale_T.new_empty(index_T1.shape)
        dx_TI = torch.empty_like(logits.x_TI)
        tensors = (logits.x_TI, index_T1, scale_T, picked_T1, dx_TI)
        rows = max(1, logits.at_a_time // logits.shape[1])
        shape = min(rows, logits.shape[0]), logits.shape[1]
        buffer_TV = workspace("logits", shape, logits.x_TI)
        if buffer_TV is None:
            buffer_TV = logits.x_TI.new_empty(shape)
        for some in zip(*(torch.split(t, rows) for t in tensors), strict=True):
            _loss_and_gradient(logits, buffer_TV[: len(some[0])], *some)
        ctx.save_for_backward(dx_TI, index_T1, scale_T)
        return reduced(picked_T1, counted_T, reduction)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """A tensor that is not formed, where nobody looks at it."""
        if torch.is_grad_enabled() or _is_looked_at(ctx):
            return _whole_gradient(ctx, dy)
        return _gradient(ctx, dy).tensor(), None, None, None, None


def _loss_and_gradient(
    logits: Logits,
    rows_TV: Tensor,
    x_TI: Tensor,
    index_T1: Tensor,
    scale_T: Tensor,
    picked_T1: Tensor,
    dx_TI: Tensor,
) -> None:
    """Fill in some rows' log-probability of the class, and gradient of the loss by x."""
    _form_rows(logits, x_TI, rows_TV)
    log_TV = log_softmax_(rows_TV.to(logits.dtype))
    torch.gather(log_TV, 1, index_T1, out=picked_T1)
    gradient_TV = logit_gradient_(log_TV, index_T1, scale_T)
    torch.mm(gradient_TV.to(x_TI.dtype), logits.weight_VI, out=dx_TI)


def _form_rows(logits: Logits, x_TI: Tensor, out_TV: Tensor) -> None:
    """The logits of some rows, on a CPU by as many classes at a time as stay in its cache."""
    classes = CLASSES if x_TI.is_cpu else logits.shape[1]
    for first in range(0, logits.shape[1], classes):
        some = slice(first, first + classes)
        weight_CI, rows_TC = logits.weight_VI[some], out_TV[:, some]
        if logits.bias is None:
            torch.mm(x_TI, weight_CI.t(), out=rows_TC)
        else:
            torch.addmm(logits.bias[some], x_TI, weight_CI.t(), out=rows_TC)


def _gradient(ctx: Any, dy: Tensor) -> LogitGradient:
    dx_TI, index_T1, scale_T = ctx.saved_tensors
    return LogitGradient(ctx.logits, dx_TI * dy.to(dx_TI.dtype), index_T1, scale_T * dy)


@first_order
def _whole_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, dy).whole(), None, None, None, None


def _is_looked_at(ctx: Any) -> bool:
    """Whether someone may see the gradient: by `retain_grad`, a hook, or from `autograd.grad`.

    A call that names what it wants gradients of does not reach the anchor.
    """
    if any(logits.retains_grad or logits._backward_hooks for logits in ctx.tensors):
        return True
    anchor = ctx.next_functions[-1][0]
    return anchor is None or not torch._C._will_engine_execute_node(anchor)


def deferred_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """`cross_entropy` of `Logits` that are not formed, `[T, V]`."""
    anchor = torch.zeros((), requires_grad=True).clone()
    apply: Any = DeferredCrossEntropy.apply
    y: Tensor = apply(logits, target, ignore_index, reduction, anchor)
    return y
