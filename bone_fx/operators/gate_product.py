"""`bone_fx::gate_product`: an activation times another tensor, keeping the two inputs only.

SwiGLU and its kin (arXiv 2002.05202). Autograd keeps the activation's result as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register

_aten = torch.ops.aten

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (functional.silu, _aten.silu_backward.default),
    "gelu": (functional.gelu, _aten.gelu_backward.default),
    "gelu_tanh": (
        lambda gate: functional.gelu(gate, approximate="tanh"),
        lambda dy, gate: _aten.gelu_backward.default(dy, gate, approximate="tanh"),
    ),
}
"""Activation and its derivative, `(dy, gate) -> dgate`."""


class GateProduct(torch.autograd.Function):
    """`activation(gate) * up`; second derivatives are refused."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """In the dtype of the product."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ACTIVATIONS[activation][0](gate) * up

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The activation is computed again."""
        gate, up = ctx.saved_tensors
        apply, derive = ACTIVATIONS[ctx.activation]
        dgate = dup = None
        if ctx.needs_input_grad[0]:
            dgate = derive((dy * up).to(gate.dtype), gate)
        if ctx.needs_input_grad[1]:
            dup = apply(gate).mul(dy).to(up.dtype)
        return dgate, dup, None


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
