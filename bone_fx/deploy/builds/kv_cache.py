"""A decoder's cache in int8 or fp8: whether its operators take one, and by which scales.

Shape letters: B batch, S new tokens, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from torch import Tensor

from bone_fx.capture.decoder.attention_emitter import AttentionLayer
from bone_fx.deploy.builds.calibrate import CacheCalibration
from bone_fx.errors import ExportError, first_line
from bone_fx.onnx.kernels import CONTRIB
from bone_fx.onnx.quantize_cache import (
    ATTENTION,
    COS,
    DTYPES,
    CacheScales,
    QuantizeCache,
    cached_attention,
    rotated_partners,
    why_not_quantized,
)
from bone_fx.runtime.session import open_session

LARGEST_CODES = {"int8": 127, "fp8": 448}
HEADROOM = 1.25
"""Of the largest key or value that was measured: other texts hold larger ones, and what is cut off
costs more than a coarser step."""
NOT_RUN = (
    "a cache in fp8 has no CPU kernel: verification runs a twin of the graph, with a cache of"
    " floats whose keys and values are rounded to fp8; cards have kernels from compute capability"
    " 8.9 on"
)
_LEAST = 1e-3
"""Of a layer's largest key or value: what a channel that was never used is taken to hold."""
_SINKS = 11


def require_quantized_cache(
    model: ir.Model,
    layers: Sequence[AttentionLayer],
    provider: str,
    *,
    in_halves: bool,
    dtype: str = "int8",
) -> list[Tensor | None]:
    """What to measure a cache by: for each layer the channel that each is turned with.

    Args:
        model: The decoder's graph.
        layers: What the attention of each layer needs.
        provider: What the graph is written for.
        in_halves: Whether activations are in fp16.
        dtype: What the cache is to be kept in, `"int8"` or `"fp8"`; of int8 the CPU's kernel is
            asked too.

    Raises:
        ExportError: The cache cannot be kept in it; the message says why.
    """
    written_out = next((layer.plain for layer in layers if layer.plain), None)
    reason = written_out or why_not_quantized(model, provider)
    nodes = cached_attention(model)
    tried: set[str] = set()
    for layer in layers if reason is None and dtype == "int8" else ():
        node = nodes[past_keys(layer.layer)]
        kind = repr((layer.key_size, layer.heads, layer.kv_heads, sorted(_plain(node).items())))
        if kind not in tried:
            tried.add(kind)
            reason = reason or _refusal(node, layer, in_halves=in_halves)
    if reason is not None:
        raise ExportError(
            f"the cache of this model cannot be kept in {dtype}",
            expected=f"{ATTENTION} with a quantized cache in every layer",
            found=reason,
            next_step=f"export without --kv-cache {dtype}",
        )
    return [rotated_partners(nodes[past_keys(layer.layer)]) for layer in layers]


def quantize_cache(
    models: Sequence[ir.Model], calibration: CacheCalibration, dtype: str = "int8"
) -> dict[str, Any]:
    """Keep the cache of a model, and of its twin, in 8 bits, in place; returns manifest entries."""
    code = LARGEST_CODES[dtype]
    largest = calibration.largest
    scales = {past_keys(layer): scales_of(*pair, code) for layer, pair in largest.items()}
    for model in models:
        QuantizeCache(scales, DTYPES[dtype])(model)
    kept = {"dtype": dtype, "scales": "per channel", "layers": len(scales)}
    return {**kept, **calibration.entries}


def past_keys(layer: int) -> str:
    """Name of the input with the past keys of a layer."""
    return f"past_key_values.{layer}.key"


def scales_of(key_KD: Tensor, value_KD: Tensor, code: int = LARGEST_CODES["int8"]) -> CacheScales:
    """The scales by which the largest key and value of each channel are the largest code."""
    return CacheScales(*(_steps(largest, code) for largest in (key_KD, value_KD)))


def _steps(largest_KD: Tensor, code: int) -> Tensor:
    least = float(largest_KD.max()) * _LEAST or float(code)
    return largest_KD.clamp_min(least) * HEADROOM / code


def _refusal(node: ir.Node, layer: AttentionLayer, *, in_halves: bool) -> str | None:
    """What ONNX Runtime's CPU kernel says against a node of one layer with a cache in int8."""
    kind = TensorProto.FLOAT16 if in_halves else TensorProto.FLOAT
    floats = np.float16 if in_halves else np.float32
    widths = {"query": layer.heads, "key": layer.kv_heads, "value": layer.kv_heads}
    feeds: dict[str, Any] = {
        name: np.ones((1, 2, heads * layer.key_size), floats) for name, heads in widths.items()
    }
    past = np.zeros((1, layer.kv_heads, 1, layer.key_size), np.int8)
    feeds |= {"past_key": past, "past_value": past}
    feeds |= {"last": np.array([2], np.int32), "total": np.array([3], np.int32)}
    names = [*feeds, "", "", "", "", "", "k_scale", "v_scale"]
    feeds |= dict.fromkeys(names[-2:], np.ones(layer.kv_heads * layer.key_size, np.float32))
    partners = rotated_partners(node)
    if "do_rotary" in node.attributes and partners is not None:
        turned = int((partners != torch.arange(len(partners))).sum()) // 2
        names[COS : COS + 2] = ["cos", "sin"]
        feeds |= {"cos": np.ones((3, turned), floats), "sin": np.zeros((3, turned), floats)}
    if len(node.inputs) > _SINKS and node.inputs[_SINKS] is not None:
        names[_SINKS] = "sinks"
        feeds["sinks"] = np.zeros(layer.heads, floats)
    attributes = {**_plain(node), "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    outputs = ["output", "present_key", "present_value"]
    attention = helper.make_node(
        ATTENTION, names, outputs, domain=CONTRIB, kv_cache_bit_width=8, **attributes
    )
    kinds = (kind, TensorProto.INT8, TensorProto.INT8)
    graph = helper.make_graph(
        [attention],
        "trial",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
            )
            for name, value in feeds.items()
        ],
        [
            helper.make_tensor_value_info(name, each, None)
            for name, each in zip(outputs, kinds, strict=True)
        ],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(CONTRIB, 1)]
    trial = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    try:
        open_session(trial.SerializeToString()).run(None, feeds)
    except ExportError as error:
        return str(error.found)
    except Exception as error:  # noqa: BLE001 - of ONNX Runtime, whose classes have no common one
        return first_line(error)
    return None


def _plain(node: ir.Node) -> Mapping[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}
