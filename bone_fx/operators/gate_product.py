"""`bone_fx::gate_product`: an activation times another tensor, keeping the two inputs only.

SwiGLU and its kin (arXiv 2002.05202). Autograd keeps the activation's result as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register

_aten = torch.ops.aten

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "silu": (functional.silu, _aten.silu_backward.grad_input),
    "gelu": (functional.gelu, _aten.gelu_backward.grad_input),
    "gelu_tanh": (
        functools.partial(functional.gelu, approximate="tanh"),
        functools.partial(_aten.gelu_backward.grad_input, approximate="tanh"),
    ),
}
"""Activation and its derivative, `(dy, gate, grad_input=) -> dgate`."""


class GateProduct(torch.autograd.Function):
    """`activation(gate) * up`; second derivatives are refused."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """In the dtype of the product."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _times(ACTIVATIONS[activation][0](gate), up)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The activation is computed again."""
        gate, up = ctx.saved_tensors
        apply, derive = ACTIVATIONS[ctx.activation]
        dgate = dup = None
        if ctx.needs_input_grad[0]:
            dgate = (dy * up).to(gate.dtype)
            derive(dgate, gate, grad_input=dgate)
        if ctx.needs_input_grad[1]:
            dup = _times(apply(gate), dy).to(up.dtype)
        return dgate, dup, None


def _times(active: Tensor, other: Tensor) -> Tensor:
    """The product, in the memory of the first factor where it fits."""
    return active.mul_(other) if active.dtype == other.dtype else active * other


def gate_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`.

    Args:
        gate: Any shape.
        up: The same shape.
        activation: A key of `ACTIVATIONS`.

    Returns:
        The same shape.
    """
    y: Tensor = GateProduct.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return y


GATE_PRODUCT = register(
    "gate_product(Tensor gate, Tensor up, str activation) -> Tensor", gate_product
)
"""The operator as it stands in graphs: `torch.ops.bone_fx.gate_product.default`."""
