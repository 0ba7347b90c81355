"""A decoder's keys and values in 8 bits between its steps.

Shape letters: B batch, K key/value heads, D head size, P past tokens, T past and new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from bone_fx.onnx.kernels import CONTRIB
from bone_fx.onnx.recipe_tensor import set_recipe
from bone_fx.weights.recipes.recipe import Value

ATTENTION = "GroupQueryAttention"
DTYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
"""What a cache is kept in, by the names of the choice."""
PASTS, COS, BIAS, SCALES, NORMS = (3, 4), 7, 10, (12, 13), (14, 15)
"""Places of inputs: the cache, a rotary table, a bias, the cache's scales, weights of norms."""
_BITS = 8
_LARGEST_CUDA_HEAD = 256
_ROTATED = "do_rotary"
_INTERLEAVED = ("rotary_interleaved", "interleaved")
_TABLE = 2
"""Place of RotaryEmbedding's table."""
_STEPS = 6
"""Nodes between a rotary embedding and the attention: transpositions, reshapes, parts of heads."""


@dataclass(frozen=True)
class CacheScales:
    """What a step of the codes of one layer's cache is worth.

    Attributes:
        key: Of each channel of the keys, float32 `[K, D]`.
        value: Of each channel of the values.
    """

    key: Tensor
    value: Tensor


class QuantizeCache(ir.passes.InPlacePass):
    """Lets every GroupQueryAttention keep its cache in 8 bits, by a scale for each channel.

    Before: `GroupQueryAttention(q, k, v, past_key: float [B, K, P, D], past_value, …)`
    After:  `GroupQueryAttention(q, k, v, past_key: int8 [B, K, P, D], past_value, …, k_scale,
    v_scale, k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL", kv_cache_bit_width=8)`

    Args:
        scales: Of each layer, by the name of its past keys.
        dtype: What the cache is kept in: INT8, or FLOAT8E4M3FN, which CUDA alone has kernels for.
    """

    def __init__(
        self, scales: Mapping[str, CacheScales], dtype: ir.DataType = ir.DataType.INT8
    ) -> None:
        super().__init__()
        self.scales = scales
        self.dtype = dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the nodes whose cache is still in floats."""
        graph, modified = model.graph, False
        for node in graph:
            if (node.domain, node.op_type) != (CONTRIB, ATTENTION) or _is_quantized(node):
                continue
            key, value = _pasts(node)
            scales = self.scales[str(key.name)]
            node.resize_inputs(max(len(node.inputs), SCALES[1] + 1))
            for place, past, scale in (
                (SCALES[0], key, scales.key),
                (SCALES[1], value, scales.value),
            ):
                # Verification takes a constant with a dot in its name for a parameter of a layer.
                constant = ir.Value(name=f"{str(past.name).replace('.', '_')}_scale")
                set_recipe(constant, Value(scale.flatten(), origin="measured"))
                graph.register_initializer(constant)
                node.replace_input_with(place, constant)
            for cache in (key, value, *node.outputs[1:3]):
                cache.dtype = self.dtype
            for name in ("k_quant_type", "v_quant_type"):
                node.attributes[name] = ir.AttrString(name, "PER_CHANNEL")
            node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", _BITS)
            modified = True
        return ir.passes.PassResult(model, modified)


def cached_attention(model: ir.Model) -> dict[str, ir.Node]:
    """The nodes that read a cache as the operator for attention, by the name of their past keys."""
    return {
        str(_pasts(node)[0].name): node
        for node in model.graph
        if (node.domain, node.op_type) == (CONTRIB, ATTENTION)
    }


def why_not_quantized(model: ir.Model, provider: str) -> str | None:
    """Why a decoder's cache cannot be kept in 8 bits; None if it can.

    Args:
        model: The graph.
        provider: What it is written for, `"cpu"` or `"cuda"`.
    """
    nodes = cached_attention(model)
    keys = [str(v.name) for v in model.graph.inputs if str(v.name).endswith(".key")]
    if other := [name for name in keys if name not in nodes]:
        return f"{other[0]} is no input of {ATTENTION}: attention is written out"
    for name, node in nodes.items():
        if _input(node, NORMS[0]) is not None:
            return f"the {ATTENTION} of {name} norms queries and keys too"
        shape = _pasts(node)[0].shape
        size = 0 if shape is None else shape[3]
        if provider != "cuda":
            continue
        if _input(node, BIAS) is not None:
            return "the CUDA kernel takes no attention_bias beside a quantized cache"
        if isinstance(size, int) and size > _LARGEST_CUDA_HEAD:
            return f"the CUDA kernels take heads of at most {_LARGEST_CUDA_HEAD}, not {size}"
    return None


def rotated_partners(node: ir.Node) -> Tensor | None:
    """The channel that each of a head's channels is turned with, `[D]`; None if none is.

    A later position turns one into the other: the length of the pair is what no position changes.
    """
    shape, turns = _pasts(node)[0].shape, _turning(node)
    if turns is None or shape is None or not isinstance(shape[3], int):
        return None
    (embedding, table), partners = turns, torch.arange(shape[3])
    cos = _input(embedding, table)
    columns = None if cos is None or cos.shape is None else cos.shape[1]
    pairs = columns if isinstance(columns, int) else shape[3] // 2
    is_interleaved = any(embedding.attributes.get_int(name, 0) for name in _INTERLEAVED)
    turned = partners[: 2 * pairs]
    partners[: 2 * pairs] = turned ^ 1 if is_interleaved else turned.roll(pairs)
    return partners


def _turning(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The node that turns the keys of an attention, and where it has its table."""
    if node.attributes.get_int(_ROTATED, 0):
        return node, COS
    value = node.inputs[1]
    for _ in range(_STEPS):
        producer = None if value is None else value.producer()
        if producer is None or producer.op_type == "RotaryEmbedding":
            return None if producer is None else (producer, _TABLE)
        value = _input(producer, 0)
    return None


def _pasts(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    key, value = (node.inputs[place] for place in PASTS)
    assert key is not None
    assert value is not None
    return key, value


def _is_quantized(node: ir.Node) -> bool:
    return _input(node, SCALES[0]) is not None


def _input(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None
