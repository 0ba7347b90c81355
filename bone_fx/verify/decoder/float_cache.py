"""The twin of a graph with a cache in fp8, which the CPU provider has no kernel for.

Before: `GroupQueryAttention(q, k, v, past_key: fp8, …, k_scale, v_scale)`
After:  `GroupQueryAttention(q, k, v, past_key * k_scale, …)`, whose keys and values past and new
        are divided by their scales, rounded to fp8 and kept as float32 numbers; then
        `GroupQueryAttention(q, nothing, nothing, what was kept * k_scale, …)`

The first attention turns the new keys, the second reads all of them as they were kept. The cache
holds fp8's numbers in float32 between steps, under the names that it has in the graph.

Shape letters: B batch, H query heads, K key/value heads, T tokens of past and present, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from bone_fx.onnx.kernels import CONTRIB
from bone_fx.onnx.quantize_cache import ATTENTION, PASTS, SCALES

_LOWEST, _HIGHEST = -448.0, 448.0
_CASTS = 19
"""First opset whose Cast knows fp8; the operators of these graphs mean the same in it."""
_BEYOND = 1 << 40
"""More than any number of tokens."""
_QUANTIZED = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")
_HEADS, _KV_HEADS = "num_heads", "kv_num_heads"


def float_cache(model: onnx.ModelProto) -> None:
    """Let every attention with a cache in fp8 take floats, rounded to it; in place."""
    graph = model.graph
    cached = {
        value.name: value
        for value in (*graph.input, *graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT8E4M3FN
    }
    if not cached:
        return
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == ATTENTION and node.input[PASTS[0]] in cached:
            nodes += _Twin(node, cached[node.input[PASTS[0]]]).nodes
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    for value in cached.values():
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = max(opset.version, _CASTS)


class _Twin:
    """The nodes that stand for one attention, in their order."""

    def __init__(self, node: onnx.NodeProto, past: onnx.ValueInfoProto) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._name = node.output[0]
        self._query = query = node.input[0]
        kept = [each for each in node.attribute if each.name not in _QUANTIZED]
        numbers = {each.name: each.i for each in kept}
        size = past.type.tensor_type.shape.dim[3].dim_value
        width = numbers[_KV_HEADS] * size
        shape = self._constant([1, numbers[_KV_HEADS], 1, size])
        scales = [self._add("Reshape", node.input[place], shape) for place in SCALES]
        rest = node.input[PASTS[1] + 1 : SCALES[0]]
        start, end, tokens = (self._constant([each]) for each in (0, _BEYOND, 2))
        pasts = [
            # ONNX Runtime infers that an inner cache is as long as its past: a slice hides that.
            self._floats(self._add("Slice", node.input[place], start, end, tokens), scale)
            for place, scale in zip(PASTS, scales, strict=True)
        ]
        news = [*node.input[: PASTS[0]], *pasts, *rest]
        _, *made = self._attention(news, kept, ["", "", ""])
        for floats, scale, output in zip(made, scales, node.output[1:3], strict=True):
            self._round(floats, scale, output)
        whole = [
            self._floats(output, scale)
            for output, scale in zip(node.output[1:3], scales, strict=True)
        ]
        none = self._add("Slice", query, start, start, self._constant([1]))
        channels = self._constant([2])
        nothing = self._add("Slice", none, start, self._constant([width]), channels)
        if not node.input[1]:  # queries, keys and values are packed
            queries = self._constant([numbers[_HEADS] * size])
            query = self._add("Slice", query, start, queries, channels)
        self._attention([query, nothing, nothing, *whole, *rest], kept, [node.output[0], "", ""])

    def _floats(self, codes: str, scale: str) -> str:
        """What codes stand for, in the dtype of the query."""
        return self._add("CastLike", self._add("Mul", codes, scale), self._query)

    def _round(self, floats: str, scale: str, output: str) -> None:
        """The codes of keys or values, as fp8's numbers in float32."""
        in_single = self._add("Cast", floats, to=TensorProto.FLOAT)
        places = self._add("Div", in_single, scale)
        limits = [self._constant([each], TensorProto.FLOAT) for each in (_LOWEST, _HIGHEST)]
        inside = self._add("Min", self._add("Max", places, limits[0]), limits[1])
        rounded = self._add("Cast", inside, to=TensorProto.FLOAT8E4M3FN)
        self._add("Cast", rounded, output=output, to=TensorProto.FLOAT)

    def _attention(
        self, inputs: Sequence[str], attributes: Sequence[Any], outputs: Sequence[str]
    ) -> list[str]:
        names = [name or f"{self._new()}_{place}" for place, name in enumerate(outputs)]
        node = helper.make_node(ATTENTION, inputs, names, domain=CONTRIB)
        node.attribute.extend(attributes)
        self.nodes.append(node)
        return names

    def _constant(self, values: Sequence[float], dtype: int = TensorProto.INT64) -> str:
        tensor = helper.make_tensor("value", dtype, [len(values)], values)
        return self._add("Constant", value=tensor)

    def _add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or self._new()
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _new(self) -> str:
        return f"{self._name}_twin_{len(self.nodes)}"
