"""`aten.scaled_dot_product_attention` in ten ONNX operators, none of which computes a shape.

Torchlib's translation computes the scale from the run-time shape, takes its root twice and guards
against NaN on the attention matrix of every layer: 20 nodes. A row that may attend to nothing is 0
here too, as in torch, by a mask that all layers share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def translations(torchlib: Any) -> dict[Any, Callable[..., Any]]:
    """The translation table that torch's exporter takes.

    Args:
        torchlib: Torchlib's translation, which still takes `is_causal`, grouped heads and dropout.
    """
    import onnx_ir as ir
    from onnxscript.onnx_opset import opset18

    op: Any = opset18  # typed for functions of onnxscript, which this one only builds

    def scaled_dot_product_attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        plain = not (is_causal or enable_gqa or dropout_p)
        head_size = query.shape[-1] if query.shape is not None else None
        if not plain or not isinstance(head_size, int) or query.dtype is None or key.shape is None:
            return torchlib(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        rank = len(key.shape)
        factor = 1 / math.sqrt(head_size) if scale is None else scale
        scaled = op.Mul(query, op.CastLike(op.Constant(value_float=float(factor)), query))
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        scores = op.MatMul(scaled, op.Transpose(key, perm=swapped))
        if attn_mask is None:
            return op.MatMul(op.Softmax(scores, axis=-1), value)
        if attn_mask.dtype != ir.DataType.BOOL:
            return op.MatMul(op.Softmax(op.Add(scores, attn_mask), axis=-1), value)
        zero = op.CastLike(op.Constant(value_float=0.0), query)
        minus_infinity = op.CastLike(op.Constant(value_float=-math.inf), query)
        scores = op.Add(scores, op.Where(attn_mask, zero, minus_infinity))
        result = op.MatMul(op.Softmax(scores, axis=-1), value)
        attends = op.ReduceMax(
            op.Cast(attn_mask, to=ir.DataType.INT32), op.Constant(value_ints=[-1])
        )
        return op.Where(op.Cast(attends, to=ir.DataType.BOOL), result, zero)

    return {SDPA: scaled_dot_product_attention}
