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

from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register
from bone_fx.operators.loss.deferred import deferred
from bone_fx.operators.loss.deferred_loss import LogitGradient, Logits
from bone_fx.operators.plain import is_plain

AT_A_TIME = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Numbers of the logits that a loss forms at a time, by device; in float32 those of a CPU are the
most that a workspace keeps."""

SPARING = {"cpu": 6 << 20, "cuda": 1 << 25}
"""The same where memory counts for more than time; logits that are no more are not deferred.

Products of fewer rows are slower. On a CPU of two cores those of SmolLM2's head run at 170 and 180
GFLOP/s (forward, backward) for 256 rows, at 155 and 160 for 128. For a GPU it is an estimate: a
thousand rows of 128256 classes keep it busy.
"""

_LOSS_FOLLOWS: ContextVar[dict[str, int] | None] = ContextVar("loss_follows", default=None)


class Head(torch.autograd.Function):
    """`x Wᵀ + b`, not formed, for a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, at_a_time: int) -> Tensor:
        """`[..., V]`."""
        ctx.shape = x.shape
        ctx.save_for_backward(weight)
        logits = Logits(x.detach().reshape(-1, x.shape[-1]), weight, bias, at_a_time)
        return logits.tensor([*x.shape[:-1], len(weight)])

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x, which the loss may have computed."""
        gradient = deferred(dy)
        if isinstance(gradient, LogitGradient):
            return gradient.dx_TI.view(ctx.shape), None, None, None
        (weight,) = ctx.saved_tensors
        return dy @ weight, None, None, None


@contextmanager
def loss_follows(*, sparing: bool = False) -> Iterator[None]:
    """While open, `bone_fx::head` may leave its product to the loss; not under `torch.compile`.

    Args:
        sparing: Whether memory counts for more than time.
    """
    if torch.compiler.is_compiling():
        yield
        return
    token = _LOSS_FOLLOWS.set(SPARING if sparing else AT_A_TIME)
    try:
        yield
    finally:
        _LOSS_FOLLOWS.reset(token)


def head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose result, `[..., V]`, only the model's output has: it may be deferred."""
    at_a_time = _LOSS_FOLLOWS.get()
    if at_a_time is None or not _may_wait(x, weight, bias):
        return functional.linear(x, weight, bias)
    y: Tensor = Head.apply(x, weight, bias, at_a_time[x.device.type])  # type: ignore[no-untyped-call]
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
        and x.numel() // x.shape[-1] * len(weight) > SPARING.get(x.device.type, math.inf)
        and not torch.is_autocast_enabled(x.device.type)
        and is_plain(x, *fixed)
    )
