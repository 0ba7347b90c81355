"""`bone_fx::adapted_linear`: the one node a site has in a training graph (`torch.library`).

The operator is composite: autograd, autocast, FakeTensor and `torch.compile` see the products it is
made of, so that nothing is opaque to inductor and no derivative is written twice. BAT's product is
an autograd function that keeps x and W but never the folded weight, which backward recomputes.

Shapes: T tokens (any leading dimensions), I in_features, O out_features, R block size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.adapters import METHODS, bat

SCHEMA = (
    "adapted_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] blocks, str[] methods, "
    "Tensor[] block_inputs, bool transposed=False) -> Tensor"
)

_LIBRARY: Any = torch.library.Library("bone_fx", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(SCHEMA)


class BatLinear(torch.autograd.Function):
    """`y = x W'ᵀ + bias` with W' folded by one BAT block and recomputed in backward.

    The fold runs in the block's dtype, the products in `x`'s. Second derivatives are refused by
    autograd (`once_differentiable`).
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor, bias: Tensor | None, b_ARR: Tensor) -> Tensor:
        """`[..., O]` in `x`'s dtype."""
        ctx.save_for_backward(x_TI, w_OI, b_ARR)
        ctx.has_bias = bias is not None
        folded = bat.fold(w_OI.to(b_ARR.dtype), b_ARR).to(x_TI.dtype)
        return functional.linear(x_TI, folded, None if bias is None else bias.to(x_TI.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, W, bias and the block, those that are asked for."""
        x_TI, w_OI, b_ARR = ctx.saved_tensors
        w_full = w_OI.to(b_ARR.dtype)
        dx = dw = dbias = db = None
        if ctx.needs_input_grad[0]:
            dx = dy_TO @ bat.fold(w_full, b_ARR).to(dy_TO.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            dy_2d = dy_TO.reshape(-1, dy_TO.shape[-1])
            dw_folded = (dy_2d.t() @ x_TI.reshape(-1, x_TI.shape[-1])).to(b_ARR.dtype)
            if ctx.needs_input_grad[3]:
                db = bat.gradient(w_full, dw_folded, b_ARR.shape[-1])
            if ctx.needs_input_grad[1]:
                dw = bat.weight_gradient(dw_folded, b_ARR).to(w_OI.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = dy_TO.reshape(-1, dy_TO.shape[-1]).sum(0)
        return dx, dw, dbias, db


def _bat_linear(x_TI: Tensor, w_OI: Tensor, bias: Tensor | None, b_ARR: Tensor) -> Tensor:
    device = x_TI.device.type
    autocast = torch.is_autocast_enabled(device)
    compute = torch.get_autocast_dtype(device) if autocast else b_ARR.dtype
    with torch.autocast(device, enabled=False):
        y: Tensor = BatLinear.apply(x_TI.to(compute), w_OI, bias, b_ARR)  # type: ignore[no-untyped-call]
    return y


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: list[Tensor],
    methods: list[str],
    block_inputs: list[Tensor],
    transposed: bool = False,
) -> Tensor:
    """A linear layer under a list of block adapters, applied in the order of the list.

    Args:
        x: Input `[..., I]`.
        weight: Base weight, `[O, I]`, or `[I, O]` if `transposed` (HF `Conv1D`, `addmm`).
        bias: Base bias `[O]` or None.
        blocks: One block an adapter, shaped as its method says; usually float32, whatever the
            weight's dtype.
        methods: The method of each block, a key of `bone_fx.adapters.METHODS`.
        block_inputs: Empty, or for each block the input it sees instead of `x` (dropout on the
            adapter's branch, as `miss_dropout` in PEFT 0.18.1). A block that a later BAT acts upon
            works on the weight and ignores it.
        transposed: Whether `weight` is `[I, O]`.

    Returns:
        `[..., O]` in the dtype of the base product. Rounding follows PEFT 0.18.1: the branch is
        computed in the block's dtype and the sum is cast back once.
    """
    last = max((i for i, name in enumerate(methods) if not METHODS[name].additive), default=-1)
    if last < 0:
        y = _base_product(x, weight, bias, transposed)
        out_features = y.shape[-1]
    else:
        w_OI = weight.t() if transposed else weight
        for block, name in zip(blocks[:last], methods[:last], strict=True):
            w_OI = METHODS[name].fold(w_OI.to(block.dtype), block)
        out_features = w_OI.shape[0]
        y = _bat_linear(x, w_OI, bias, blocks[last])
    dtype = x.dtype if last >= 0 else y.dtype
    for i in range(last + 1, len(blocks)):
        term = METHODS[methods[i]].term
        if term is None:
            raise AssertionError(f"{methods[i]} after the last method that acts on the weight")
        source = block_inputs[i] if block_inputs else x
        y = y + term(source.to(blocks[i].dtype), blocks[i], out_features)
    return y.to(dtype)


def _base_product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return functional.linear(x, weight, bias)
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(
        *x.shape[:-1], weight.shape[1]
    )


_LIBRARY.impl("adapted_linear", adapted_linear, "CompositeImplicitAutograd")

ADAPTED_LINEAR = torch.ops.bone_fx.adapted_linear.default
"""The operator as it stands in graphs: `torch.ops.bone_fx.adapted_linear.default`."""
