"""`aten.scaled_dot_product_attention` as one `com.microsoft::MultiHeadAttention`, or decomposed.

Before: `scaled_dot_product_attention(q [B, H, S, D], k [B, H, T, D], v [B, H, T, E], mask)`
After:  q, k and v as `[B, S, H * D]` -> MultiHeadAttention -> `[B, H, S, E]`

The transposes and reshapes around the operator cancel against the model's own (`onnx.cleanup`). A
boolean mask `[B, 1, 1, T]` becomes the operator's key padding mask, any other mask a bias on the
scores. What the operator cannot take (other ranks, broadcast masks) is ten ONNX operators, none of
which computes a shape: torchlib's translation takes 20 and guards against NaN in every layer.

A row that may attend to nothing is 0, as in torch, by a mask that all layers share. The exception
is a padding mask that is an input of the model: a sentence of padding alone gives the mean of its
values, as transformers' eager attention does, and saves an operator in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import onnx_ir as ir

SDPA = torch.ops.aten.scaled_dot_product_attention.default

Contrib = Callable[..., Any]
"""Records an operator of the `com.microsoft` domain: (op_type, inputs, attributes, dtype)."""


def translations(torchlib: Any, contrib: Contrib) -> dict[Any, Callable[..., Any]]:
    """The translation table that torch's exporter takes.

    Args:
        torchlib: Torchlib's translation, which still takes grouped heads and dropout.
        contrib: Records an operator of ONNX Runtime's own.
    """

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
        tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        known = all(t.shape is not None and t.dtype is not None for t in tensors)
        if not known or enable_gqa or dropout_p or not isinstance(query.shape[-1], int):
            return torchlib(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        if _is_multi_head(query, key, value, is_causal):
            mask = _mask_form(query, key, attn_mask)
            if mask is not None:
                return _fused(query, key, value, attn_mask, mask, factor, is_causal, contrib)
        if is_causal:
            return torchlib(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return _decomposed(query, key, value, attn_mask, factor)

    return {SDPA: scaled_dot_product_attention}


def _is_multi_head(query: Any, key: Any, value: Any, is_causal: bool) -> bool:
    """Whether the three are `[B, H, S or T, D]` with one B and one number H."""
    shapes = [[str(dim) for dim in t.shape] for t in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes) or not isinstance(query.shape[1], int):
        return False
    sizes = isinstance(key.shape[3], int) and isinstance(value.shape[3], int)
    leading = all(shape[:2] == shapes[0][:2] for shape in shapes)
    square = not is_causal or shapes[0][2] == shapes[1][2]
    return sizes and leading and square and shapes[1][2] == shapes[2][2]


def _mask_form(query: Any, key: Any, mask: Any) -> str | None:
    """How MultiHeadAttention takes the mask: `none`, `padding`, `bias`; None if it does not."""
    if mask is None:
        return "none"
    import onnx_ir as ir

    batch, heads, length, total = (str(d) for d in (*query.shape[:3], key.shape[2]))
    dims = [str(dim) for dim in mask.shape]
    boolean = mask.dtype == ir.DataType.BOOL
    if boolean and dims == [batch, "1", "1", total] and total != "1":
        return "padding"
    whole = dims[-2:] == [length, total] and (boolean or mask.dtype == query.dtype)
    leading = dims[:-2]
    if whole and (
        not leading or (len(leading) == 2 and leading[0] in (batch, "1") and leading[1] == "1")
    ):
        return "bias"
    by_head = len(leading) == 2 and leading[0] in (batch, "1") and leading[1] == heads
    return "bias" if whole and by_head and not boolean else None


def _fused(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    form: str,
    factor: float,
    is_causal: bool,
    contrib: Contrib,
) -> Any:
    op = _opset()
    heads, width = query.shape[1], value.shape[3]
    lowest = float(torch.finfo(_torch_dtype(query.dtype)).min)
    attributes: dict[str, Any] = {"num_heads": heads, "scale": float(factor)}
    if is_causal:
        attributes["unidirectional"] = 1
    inputs = [_rows(query), _rows(key), _rows(value)]
    attends = None
    if form == "padding":
        attributes["mask_filter_value"] = lowest
        padding = op.Squeeze(mask, op.Constant(value_ints=[1, 2]))
        inputs += [None, _cast(padding, "INT32")]
        if not _is_input(mask):
            attends = _any(op.Squeeze(mask, op.Constant(value_ints=[1])))
    elif form == "bias":
        bias = mask
        if _is_boolean(mask):
            zero, minimum = (_constant(number, query) for number in (0.0, lowest))
            bias = op.Where(mask, zero, minimum)
            rows = mask if len(mask.shape) == 2 else op.Squeeze(mask, op.Constant(value_ints=[1]))
            attends = _any(rows)
        if len(mask.shape) == 2:
            bias = op.Unsqueeze(bias, op.Constant(value_ints=[0, 1]))
        inputs += [None, None, bias]
    result = contrib("MultiHeadAttention", inputs, attributes, query.dtype)
    flat = _shape(query.shape[0], query.shape[2], heads * width)
    if attends is not None:
        result.shape = flat
        result = op.Where(attends, result, _constant(0.0, query))
        result.dtype = query.dtype
    result.shape = flat
    split = op.Reshape(result, op.Constant(value_ints=[0, 0, heads, width]))
    split.shape = _shape(query.shape[0], query.shape[2], heads, width)
    split.dtype = query.dtype
    return op.Transpose(split, perm=[0, 2, 1, 3])


def _decomposed(query: Any, key: Any, value: Any, mask: Any, factor: float) -> Any:
    op = _opset()
    rank = len(key.shape)
    scaled = op.Mul(query, _constant(float(factor), query))
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scores = op.MatMul(scaled, op.Transpose(key, perm=swapped))
    if mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    if not _is_boolean(mask):
        return op.MatMul(op.Softmax(op.Add(scores, mask), axis=-1), value)
    zero, minus_infinity = (_constant(number, query) for number in (0.0, -math.inf))
    scores = op.Add(scores, op.Where(mask, zero, minus_infinity))
    result = op.MatMul(op.Softmax(scores, axis=-1), value)
    return op.Where(_any(mask), result, zero)


def _rows(heads: Any) -> Any:
    """`[B, H, S, D]` as `[B, S, H * D]`."""
    op = _opset()
    batch, number, length, size = heads.shape
    swapped = op.Transpose(heads, perm=[0, 2, 1, 3])
    swapped.shape, swapped.dtype = _shape(batch, length, number, size), heads.dtype
    rows = op.Reshape(swapped, op.Constant(value_ints=[0, 0, number * size]))
    rows.shape, rows.dtype = _shape(batch, length, number * size), heads.dtype
    return rows


def _any(mask: Any) -> Any:
    """Whether anything in the last dimension is allowed; the dimension stays, of size 1."""
    op = _opset()
    return _cast(op.ReduceMax(_cast(mask, "INT32"), op.Constant(value_ints=[-1])), "BOOL")


def _is_input(mask: Any) -> bool:
    """Whether the mask is an input of the program, cast and with dimensions added."""
    value: ir.Value | None = mask
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("Cast", "Unsqueeze", "Identity"):
            return False
        value = node.inputs[0]
    return value is not None


def _is_boolean(value: Any) -> bool:
    return _torch_dtype(value.dtype) == torch.bool


def _constant(number: float, like: Any) -> Any:
    op = _opset()
    return op.CastLike(op.Constant(value_float=number), like)


def _cast(value: Any, dtype: str) -> Any:
    import onnx_ir as ir

    return _opset().Cast(value, to=ir.DataType[dtype])


def _shape(*dims: Any) -> ir.Shape:
    import onnx_ir as ir

    return ir.Shape(dims)


def _torch_dtype(dtype: ir.DataType) -> torch.dtype:
    from onnx_ir.tensor_adapters import to_torch_dtype

    return to_torch_dtype(dtype)


def _opset() -> Any:
    from onnxscript.onnx_opset import opset18

    return opset18  # typed for functions of onnxscript, which these only build
