"""`bone_fx::head`: the linear layer that makes the model's output, left to a loss that follows.

Shapes: T tokens, V classes, I in_features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.operators.deferred import deferred
from bone_fx.operators.deferred_loss import AT_A_TIME, LogitGradient, Logits
from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register
from bone_fx.operators.plain import is_plain

_LOSS_FOLLOWS: ContextVar[bool] = ContextVar("loss_follows", default=False)


class Head(torch.autograd.Function):
    """`x Wᵀ + b`, not formed, for a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., V]`."""
        ctx.shape = x.shape
        ctx.save_for_backward(weight)
        logits = Logits(x.detach().reshape(-1, x.shape[-1]), weight, bias)
        return logits.tensor([*x.shape[:-1], len(weight)])

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x, which the loss may have computed."""
        gradient = deferred(dy)
        if isinstance(gradient, LogitGradient):
            return gradient.dx_TI.view(ctx.shape), None, None
        (weight,) = ctx.saved_tensors
        return dy @ weight, None, None


@contextmanager
def loss_follows() -> Iterator[None]:
    """While open, `bone_fx::head` may leave its product to the loss; not under `torch.compile`."""
    if torch.compiler.is_compiling():
        yield
        return
    token = _LOSS_FOLLOWS.set(True)
    try:
        yield
    finally:
        _LOSS_FOLLOWS.reset(token)


def head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose result, `[..., V]`, only the model's output has: it may be deferred."""
    if not _LOSS_FOLLOWS.get() or not _may_wait(x, weight, bias):
        return functional.linear(x, weight, bias)
    y: Tensor = Head.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


HEAD = register("head(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", head)
"""The operator as it stands in graphs: `torch.ops.bone_fx.head.default`."""


def _may_wait(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the logits are many, the head frozen, and the loss can compute the gradient of x."""
    fixed = (weight,) if bias is None else (weight, bias)
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and not any(tensor.requires_grad for tensor in fixed)
        and x.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and all(tensor.dtype == x.dtype for tensor in fixed)
        and x.numel() // x.shape[-1] * len(weight) > AT_A_TIME.get(x.device.type, math.inf)
        and not torch.is_autocast_enabled(x.device.type)
        and is_plain(x, *fixed)
    )
