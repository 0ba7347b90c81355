"""A decorator for the backward of an autograd function that has first derivatives only.

A backward computes in the dtypes that forward chose, also where `loss.backward()` is called under
autocast: that is for forwards, and would round in between.

One that cannot be differentiated says so when someone tries.
PyTorch's `once_differentiable` says so only where the incoming gradient requires one. That of a
loss is the constant 1, and what depends on the saved tensors would silently be left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bone_fx.errors import UsageError

Gradients = tuple[Tensor | None, ...]


class _Refusal(torch.autograd.Function):
    """The gradients as they are, with a backward that raises."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor | None) -> Gradients:
        return gradients

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Gradients:
        raise UsageError(
            "second derivatives of the training graph's operators are not computed",
            expected="first derivatives only",
            next_step="leave out create_graph=True",
        )


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorate the backward of an autograd function.

    Under `torch.compile`, which refuses second derivatives by itself, it changes nothing.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *gradients: Tensor | None) -> Gradients:
        found_on = {g.device.type for g in gradients if g is not None and not g.is_meta}
        device = next(iter(found_on), "cpu")
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return guarded(ctx, *gradients)
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            grads = backward(ctx, *gradients)
        if torch.compiler.is_compiling():
            return grads
        anchor = torch.zeros((), requires_grad=True)
        marked: Gradients = _Refusal.apply(anchor, *grads)  # type: ignore[no-untyped-call]
        return marked

    return guarded
